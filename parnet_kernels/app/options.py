"""Options that several commands have, and what they mean together with what a network says of itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from parnet_kernels.app.console import shown
from parnet_kernels.preprocessing import COLORS, INTERPOLATIONS, Described, Preprocessing


class Activation(StrEnum):
    silu = "silu"
    relu = "relu"


Interpolation = StrEnum("Interpolation", INTERPOLATIONS)  # type: ignore[misc]
Color = StrEnum("Color", [*COLORS])  # type: ignore[misc]


def use_threads(threads: int | None) -> None:
    """For all that follows in this process."""
    if threads is not None:
        torch.set_num_threads(threads)


def numbers(text: str) -> tuple[float, ...]:
    """Of an option such as 0.485,0.456,0.406."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"expected numbers such as 0.485,0.456,0.406, got {text!r}") from error


def pixels(text: str) -> tuple[int, int]:
    """Of --size: "224" or "224x320" → (height, width)."""
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text, re.ASCII)
    if match is None:
        raise typer.BadParameter(f"--size must be pixels such as 224, or height x width such as 224x320, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


CheckpointArgument = Annotated[Path, typer.Argument(help="Training checkpoint (.pth) or safetensors file.")]
CheckpointOption = Annotated[Path, typer.Option(help="Training checkpoint (.pth) or safetensors file.")]
EmaOption = Annotated[bool, typer.Option("--ema", help="Take the EMA weights of a training checkpoint.")]
ActivationOption = Annotated[
    Activation | None,
    typer.Option(help="Activation the checkpoint was trained with; default: what the file says, else SiLU."),
]
IgnoreClassesOption = Annotated[
    bool, typer.Option("--ignore-classes", help="Leave objects of unknown classes in a checkpoint out.")
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, max=1024, help="CPU threads: one for each idle core. Default: PyTorch's.")
]
LabelsOption = Annotated[
    Path | None, typer.Option(help="Text file with one class name a line; default: those of the checkpoint.")
]
# Default of the following: what the checkpoint says, else what is assumed of every network.
SizeOption = Annotated[
    str | None, typer.Option(help="Pixels that the network sees: 224, or height x width such as 480x640.")
]
CropOption = Annotated[float | None, typer.Option(help="Their share of the resized image's side.")]
InterpolationOption = Annotated[Interpolation | None, typer.Option(help="Filter that resizes.")]
MeanOption = Annotated[str | None, typer.Option(help="Subtracted from values in 0…1: R,G,B (in --color's order).")]
StdOption = Annotated[str | None, typer.Option(help="Divides values then: R,G,B (in --color's order).")]
ColorOption = Annotated[Color | None, typer.Option(help="Order of the channels.")]


def preprocessing_of(network: Described, path: Path, **asked: Any) -> tuple[Preprocessing, str]:
    """(what to do with pictures, a line that says so): what is asked for, else what `network`, read from `path`, says,
    else what is assumed.

    Raises:
        typer.BadParameter: `asked` is not possible.
        ValueError: nothing is said or can be assumed.
    """
    found = network.preprocessing or Preprocessing.assumed(network.config.in_chans)
    of_text: dict[str, Callable[[str], Any]] = {"size": pixels, "mean": numbers, "std": numbers}
    changes = {
        name: of_text[name](value) if name in of_text else str(value) if isinstance(value, StrEnum) else value
        for name, value in asked.items()
        if value is not None
    }
    try:
        used = found.replace(**changes)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if used.channels != network.config.in_chans:
        raise typer.BadParameter(f"--color {used.color}: the network takes {network.config.in_chans} channels")
    before = asdict(found)
    others = [f"{name} {value} asked for, not {before[name]}" for name, value in asdict(used).items()
              if value != before[name]]  # fmt: skip
    said = f"as {shown(path)} says" if network.preprocessing else f"assumed, {shown(path)} does not say"
    return used, f"preprocessing: {used} ({'; '.join([said, *others])})"


def class_names(path: Path) -> list[str]:
    """One class a line: UTF-8 with or without a byte-order mark; only line feeds part lines. Spaces at the ends of
    lines, and empty lines at the end of the file, are no part of a name.

    Raises:
        typer.BadParameter: for another encoding, or what is no file (a pipe would block).
    """
    if path.exists() and not path.is_file():
        raise typer.BadParameter(f"{path} must be a text file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{path} must be UTF-8 text: {error}") from error
    return [line.rstrip(" \t\r") for line in text.rstrip(" \t\r\n").split("\n")]


def name_classes(network: Described, labels: Path | None) -> str | None:
    """Gives `network` the class names in the file `labels`; returns a line that says which names replace its own.

    Raises:
        typer.BadParameter: the file cannot be read, or names another number of classes.
    """
    if labels is None:
        return None
    names, before = class_names(labels), network.class_names
    if len(names) != network.config.num_classes:
        raise typer.BadParameter(f"{labels} names {len(names)} classes, the network has {network.config.num_classes}")
    network.class_names = tuple(names)
    return f"class names: those of {shown(labels)}, not the network's own" if before else None
