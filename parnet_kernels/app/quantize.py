"""`parnet quantize`: an int8 network from a float one and pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor

from parnet_kernels.app.console import print_table, shown
from parnet_kernels.app.options import ActivationOption, CheckpointArgument, EmaOption, preprocessing_of
from parnet_kernels.checkpoint import load_model, save
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.preprocessing import Preprocessing
from parnet_kernels.quantize import RANGES, layer_errors
from parnet_kernels.quantized import QuantizedParNet

BATCH = 16


def quantize(
    checkpoint: CheckpointArgument,
    data: Annotated[Path, typer.Argument(help="Folder of pictures; in folders named as the classes for accuracy.")],
    output: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    images: Annotated[int, typer.Option(min=1, help="Pictures that set the ranges, spread over the folder.")] = 256,
    ranges: Annotated[str, typer.Option("--range", help=f"Of a map's values: {', '.join(RANGES)}.")] = "mse",
    ema: EmaOption = False,
    activation: ActivationOption = None,
) -> None:
    """Round a network to int8, calibrated on pictures; report what it costs, layer by layer."""
    from parnet_kernels.app.sources import pictures

    if output.suffix != ".safetensors":
        raise typer.BadParameter(f"output must end in .safetensors, got {output}")
    if ranges not in RANGES:
        raise typer.BadParameter(f"--range must be one of {', '.join(RANGES)}, got {ranges!r}")
    network = load_model(checkpoint, ema, activation and activation.value)
    network.preprocessing, told = preprocessing_of(network, checkpoint)
    typer.echo(f"parnet: {told}", err=True)
    paths = pictures([str(data)], [])
    chosen = paths[:: max(1, len(paths) // images)][:images]
    batches = [x for _, x in _inputs(chosen, network.preprocessing)]
    if not batches:
        raise typer.BadParameter(f"no picture of {data} can be read")
    quantized = network.quantize(batches, range=ranges)
    save(quantized, output)
    errors = layer_errors(network, quantized, batches[0])
    console = Console()
    print_table(console, ("layer", "error of its map"), [(name, f"{e:.2%}") for name, e in errors.items()])
    sizes = [os.path.getsize(p) / 1e6 for p in (checkpoint, output)]
    typer.echo(
        f"{shown(output)}: int8, {sizes[1]:.1f} MB ({shown(checkpoint)}: {sizes[0]:.1f} MB), {len(chosen)} pictures"
    )
    labelled = _labelled(paths, network.class_names)
    n, *counts = _accuracy(network, quantized, labelled, network.preprocessing)
    if n:
        before, after, same = (f"{count / n:.2%}" for count in counts)
        typer.echo(f"accuracy on {n} pictures: float32 {before}, int8 {after}; the same class: {same}")
    if reason := quantized.why_not():
        typer.echo(f"parnet: int8 is not faster here: {reason}", err=True)


def _inputs(paths: list[str], preprocessing: Preprocessing) -> Iterator[tuple[list[str], Tensor]]:
    """Paths and network inputs of the pictures that can be read; the others are told on standard error."""
    from parnet_kernels.app.decoding import decoded
    from parnet_kernels.app.images import normalised

    for chunk in decoded(paths, preprocessing, BATCH, workers=0):
        for _, reason in chunk.errors:
            typer.echo(f"parnet: {shown(reason)}", err=True)
        if chunk.paths:
            yield chunk.paths, normalised([torch.from_numpy(p) for p in chunk.pixels], preprocessing)


def _labelled(paths: list[str], class_names: tuple[str, ...] | None) -> dict[str, int]:
    """The class of each picture whose folder has a class's name."""
    classes = {name: i for i, name in enumerate(class_names or ())}
    return {path: classes[folder] for path in paths if (folder := Path(path).parent.name) in classes}


@torch.inference_mode()
def _accuracy(
    network: DeployedParNet, quantized: QuantizedParNet, labelled: dict[str, int], preprocessing: Preprocessing
) -> list[int]:
    """Pictures that can be read; of these, those that the float network has right, that the int8 network has right, and
    that both take for the same class.
    """
    counts = [0, 0, 0, 0]
    for paths, x in _inputs([*labelled], preprocessing):
        wanted = torch.tensor([labelled[path] for path in paths])
        a, b = network(x).argmax(1), quantized(x).argmax(1)
        hits = [len(paths), *(int(same.sum()) for same in (a == wanted, b == wanted, a == b))]
        counts = [count + hit for count, hit in zip(counts, hits, strict=True)]
    return counts
