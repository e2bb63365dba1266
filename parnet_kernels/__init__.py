"""Fused kernels for ParNet (Non-deep Networks, arXiv 2110.07641): every layer one operation."""

from parnet_kernels import _native  # registers the schemas; must come first
from parnet_kernels import ops as ops
from parnet_kernels._version import __version__ as __version__
