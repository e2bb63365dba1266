"""Networks as ONNX files, for the engines that read them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from parnet_kernels._version import __version__
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.export.graph import graph_of, int8_graph_of
from parnet_kernels.export.lowering import Shape, lower
from parnet_kernels.export.network import deployed_form, int8_form, metadata
from parnet_kernels.export.onnx_model import OLDEST_OPSET, OPSET, onnx_model
from parnet_kernels.files import check_target, write_whole
from parnet_kernels.model import ParNet
from parnet_kernels.quantized import QuantizedParNet

DYNAMIC = ("batch", "size")


def onnx(
    network: DeployedParNet | ParNet | QuantizedParNet,
    path: str | Path,
    size: tuple[int, int] | None = None,
    dynamic: Collection[str] = DYNAMIC,
    opset: int = OPSET,
) -> None:
    """Writes `network`, folded, as an ONNX model of standard operators, in the form that engines run fastest.

    The input is "image" [N, in_chans, H, W]; the output "logits" [N, num_classes], or without a classifier "pooled"
    [N, P]; both in the network's dtype, float32 or float16. An int8 network's maps pass through QuantizeLinear and
    DequantizeLinear with its scales, its weights are 8-bit integers behind a DequantizeLinear for each output channel,
    input and output are float32: the same function, but that an engine sums products in its own order, so that
    a value halfway between two bytes may round either way. The model's metadata (`metadata_props`) hold
    `parnet_config`, and `parnet_preprocessing` and `parnet_class_names` where the network has them, as JSON.

    Args:
        network: of any form; a training form is folded with its running statistics.
        path: the file to write; it appears when it is complete.
        size: the one height and width that the model takes; None: any, if "size" is dynamic.
        dynamic: which sizes of the input are left open, of "batch" (else 1) and "size" (unless `size` is given).
        opset: version of the operator set, 13 or later.

    Raises:
        ImportError: the package `onnx` is not installed.
        ValueError: an argument that does not fit, named; or a network to which something was done that the file would
            not hold: hooks, patched or added layers, weights that need a gradient.
        TypeError: `network` is no ParNet.
        OSError: the file cannot be written.
    """
    library = needed()
    newest = library.defs.onnx_opset_version()
    if type(opset) is not int or not OLDEST_OPSET <= opset <= newest:
        raise ValueError(f"export.onnx: `opset` must be from {OLDEST_OPSET} to {newest}, got {opset!r}")
    check_target(path, "export.onnx")
    if isinstance(network, QuantizedParNet):
        graph = int8_graph_of(int8_form(network, "export.onnx"))
    else:
        network = deployed_form(network, "export.onnx", "a ParNet, DeployedParNet or QuantizedParNet")
        graph = graph_of(network)
    dtype = network.head_weight.dtype
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"export.onnx: `network` must be float32 or float16, got {dtype}: `network.float()` is")
    shape = _shape(network, size, dynamic)
    program = lower(graph, [shape])
    model = onnx_model(program, (shape[0], network.num_classes or network.num_features), opset=opset)
    model.producer_name, model.producer_version = "parnet_kernels", __version__
    library.helper.set_model_props(model, metadata(network))
    write_whole(path, model.SerializeToString())


def needed() -> Any:
    """The package onnx.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import onnx as library
    except ImportError as error:
        raise ImportError(f"export.onnx needs `pip install parnet-kernels[onnx]`: {error}") from error
    return library


def _shape(network: DeployedParNet | QuantizedParNet, size: Any, dynamic: Collection[str]) -> Shape:
    if isinstance(dynamic, str) or not set(dynamic) <= set(DYNAMIC):
        raise ValueError(f"export.onnx: `dynamic` must be a subset of {DYNAMIC}, got {dynamic!r}")
    pixels: tuple[int | str, int | str] = ("height", "width")
    if size is not None:
        if not (isinstance(size, tuple | list) and len(size) == 2 and all(type(n) is int and n >= 1 for n in size)):
            raise ValueError(f"export.onnx: `size` must be (height, width), both ≥ 1, or None, got {size!r}")
        pixels = (size[0], size[1])
    elif "size" not in dynamic:
        raise ValueError('export.onnx: `size` must be given where `dynamic` has no "size", got None')
    return ("batch" if "batch" in dynamic else 1, network.config.in_chans, *pixels)
