"""Networks for other runtimes; each needs an optional package, and says so."""

from parnet_kernels.export import decompositions  # noqa: F401  registers what torch.onnx.export(dynamo=True) needs
from parnet_kernels.export.onnx_file import onnx as onnx
