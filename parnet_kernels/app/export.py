"""`parnet export`: a network as a file for another runtime."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from parnet_kernels import export as targets
from parnet_kernels.app.console import shown
from parnet_kernels.app.options import Activation, ActivationOption, CheckpointArgument, EmaOption, pixels
from parnet_kernels.checkpoint import load_network
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.export import onnx_file
from parnet_kernels.export.onnx_model import OPSET
from parnet_kernels.files import check_target
from parnet_kernels.quantized import QuantizedParNet


class Dtype(StrEnum):
    float32 = "float32"
    float16 = "float16"


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


def export(
    checkpoint: CheckpointArgument,
    output: Annotated[Path, typer.Argument(help="The file to write; its ending names the form: .onnx or .pt2.")],
    size: Annotated[
        str | None, typer.Option(help="Pixels that the file is made for: 224, or 224x320. Default: any, but for a GPU.")
    ] = None,
    one_image: Annotated[bool, typer.Option("--one-image", help="One image at a time; default: any number.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="Of weights, input and output.")] = Dtype.float32,
    device: Annotated[Device, typer.Option(help="Of a .pt2: cpu, or the GPU of this machine, one image.")] = Device.cpu,
    opset: Annotated[int, typer.Option(help="ONNX: version of the operator set.")] = OPSET,
    ema: EmaOption = False,
    activation: ActivationOption = None,
) -> None:
    """Write a network for ONNX Runtime, OpenVINO, TensorRT and others (.onnx), or for C++ without Python (.pt2)."""
    if output.suffix not in (".onnx", ".pt2"):
        raise typer.BadParameter(f"output must end in .onnx or .pt2, got {output}")
    if output.suffix == ".pt2":
        if device is Device.cpu and (size is not None or one_image or opset != OPSET):
            raise typer.BadParameter("--size, --one-image and --opset are for .onnx: a .pt2 takes any images")
        if device is Device.cuda:
            if opset != OPSET:
                raise typer.BadParameter("--opset is for .onnx")
            if size is None:
                raise typer.BadParameter("--device cuda needs --size: the launches are planned for one")
            if not torch.cuda.is_available():
                raise typer.BadParameter(
                    "--device cuda needs a GPU, for which launches are planned, that PyTorch can use"
                )
        sides = None if size is None else pixels(size)
        check_target(output, "export")
        network = _loaded(checkpoint, dtype, ema, activation)
        if isinstance(network, QuantizedParNet):
            raise typer.BadParameter("a .pt2 holds no int8 network; export it as .onnx, or the float network")
        targets.package(network.to(device.value), output, size=sides)
        images = "any number of images of any size" if sides is None else f"one image of {sides[0]} x {sides[1]} pixels"
        typer.echo(f"{shown(output)}: AOTInductor package, {device.value}, {dtype.value}, {images}")
        return
    if device is not Device.cpu:
        raise typer.BadParameter("--device is for .pt2: an .onnx runs where its engine does")
    try:
        onnx_file.needed()
    except ImportError as error:
        raise typer.BadParameter(str(error)) from error
    sides = None if size is None else pixels(size)
    network = _loaded(checkpoint, dtype, ema, activation)
    dynamic = [name for name, free in (("batch", not one_image), ("size", sides is None)) if free]
    targets.onnx(network, output, sides, dynamic, opset)
    images = "one image" if one_image else "any number of images"
    where = "of any size" if sides is None else f"of {sides[0]} x {sides[1]} pixels"
    form = "int8 (QDQ)" if isinstance(network, QuantizedParNet) else dtype.value
    typer.echo(f"{shown(output)}: ONNX, opset {opset}, {form}, {images} {where}")


def _loaded(
    checkpoint: Path, dtype: Dtype, ema: bool, activation: Activation | None
) -> DeployedParNet | QuantizedParNet:
    network = load_network(checkpoint, ema, activation and activation.value)
    if not isinstance(network, QuantizedParNet):
        return network.to(getattr(torch, dtype.value))
    if dtype is not Dtype.float32:
        raise typer.BadParameter(f"--dtype must be float32 for an int8 network, got {dtype.value}")
    return network
