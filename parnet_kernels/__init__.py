"""Fused kernels for ParNet (Non-deep Networks, arXiv 2110.07641): every layer one operation."""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from parnet_kernels import _native  # noqa: F401  registers the schemas; must come first
from parnet_kernels import export as export
from parnet_kernels import ops as ops
from parnet_kernels._version import __version__ as __version__
from parnet_kernels.checkpoint import CheckpointError as CheckpointError
from parnet_kernels.checkpoint import load_checkpoint as load_checkpoint
from parnet_kernels.checkpoint import load_deployed as load_deployed
from parnet_kernels.checkpoint import load_model as load_model
from parnet_kernels.checkpoint import load_network as load_network
from parnet_kernels.checkpoint import load_quantized as load_quantized
from parnet_kernels.checkpoint import save as save
from parnet_kernels.config import ParNetConfig as ParNetConfig
from parnet_kernels.deployed import DeployedParNet as DeployedParNet
from parnet_kernels.model import ParNet as ParNet
from parnet_kernels.model import parnet_cifar as parnet_cifar
from parnet_kernels.model import parnet_l as parnet_l
from parnet_kernels.model import parnet_m as parnet_m
from parnet_kernels.model import parnet_s as parnet_s
from parnet_kernels.model import parnet_xl as parnet_xl
from parnet_kernels.preprocessing import Preprocessing as Preprocessing
from parnet_kernels.quantized import QuantizedParNet as QuantizedParNet

if _TYPE_CHECKING:
    from parnet_kernels.app.classifier import Classifier as Classifier


def __getattr__(name: str) -> object:
    if name == "Classifier":  # imports Pillow: not for those who do not ask
        from parnet_kernels.app.classifier import Classifier

        return Classifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
