"""`parnet predict`: classes of pictures, few or very many."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from parnet_kernels.app import results
from parnet_kernels.app.console import shown
from parnet_kernels.app.decoding import decoded
from parnet_kernels.app.images import normalised
from parnet_kernels.app.options import (
    ActivationOption,
    CheckpointOption,
    ColorOption,
    CropOption,
    EmaOption,
    IgnoreClassesOption,
    InterpolationOption,
    LabelsOption,
    MeanOption,
    SizeOption,
    StdOption,
    ThreadsOption,
    name_classes,
    preprocessing_of,
    use_threads,
)
from parnet_kernels.app.results import RESUMABLE, Format, Result
from parnet_kernels.app.sources import Share, pictures, without
from parnet_kernels.checkpoint import CheckpointError, load_network
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.quantized import QuantizedParNet

START = timedelta(minutes=10)  # in which the processes of torchrun have to find each other
FEW = 64  # pictures that are decoded faster than workers start


def predict(
    images: Annotated[
        list[str] | None, typer.Argument(help="Image files, folders, and patterns such as 'photos/**/*.jpg'.")
    ] = None,
    *,
    checkpoint: CheckpointOption,
    lists: Annotated[
        list[Path] | None, typer.Option("--list", help="Text file with one path a line; may be repeated.")
    ] = None,
    size: SizeOption = None,
    crop: CropOption = None,
    interpolation: InterpolationOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    color: ColorOption = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to print for each image.")] = 5,
    labels: LabelsOption = None,
    ema: EmaOption = False,
    activation: ActivationOption = None,
    ignore_classes: IgnoreClassesOption = False,
    form: Annotated[
        Format | None, typer.Option("--format", help="Of the output; default: by --out's ending, else a table.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    out: Annotated[Path | None, typer.Option(help="File to write; default: standard output.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with --out (.jsonl or .csv) where an earlier run ended.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Images in one call of the network.")] = 16,
    workers: Annotated[
        int | None, typer.Option(min=0, max=256, help="Processes that decode; default: by images and cores.")
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Classify images: files, folders, patterns, lists.

    What is done to them, and images that cannot be classified, are told on standard error; the exit status is 1 if
    there were any. Under torchrun each process takes its share and writes a file of its own.
    """
    form = Format.json if as_json else form or Format.of(out)
    share = Share.of_environment()
    if share.world > 1 and out is None:
        raise typer.BadParameter("several processes need --out: each writes a file of its own")
    if resume and (out is None or form not in RESUMABLE):
        raise typer.BadParameter("--resume needs --out with format jsonl or csv")
    paths = share.of(pictures(images or [], lists or []))
    out = out and share.file(out)

    use_threads(threads)
    network = load_network(checkpoint, ema, activation and activation.value, ignore_classes=ignore_classes)
    if not network.num_classes:
        raise CheckpointError(f"{checkpoint} has no classifier")
    asked = {"size": size, "crop": crop, "interpolation": interpolation, "mean": mean, "std": std, "color": color}
    network.preprocessing, told = preprocessing_of(network, checkpoint, **asked)
    for line in (told, name_classes(network, labels)):
        if line and share.rank == 0:
            typer.echo(f"parnet: {line}", err=True)
    top = min(top, network.num_classes)
    goes_on = False
    if out is not None and form in RESUMABLE:
        made_by = results.settings(network, network.preprocessing, top)
        done = results.resumed(out, form, made_by) if resume else None
        goes_on = done is not None
        paths = without(paths, done or set())
        if not goes_on:
            results.note_settings(out, made_by)
    writer = results.writer(form, out, goes_on)
    if workers is None:
        workers = 0 if len(paths) <= FEW else max(1, min(8, cores() // share.here // 2))
    with _together(share) as failures, _progress(len(paths), share.rank == 0 and out is not None) as (advance, tell):
        for found, errors in classified(network, paths, top, batch, workers):
            writer.write(found)
            for error in errors:
                tell(f"parnet: {shown(error)}")
            failures += errors
            advance(len(found) + len(errors))
        writer.close()
    if failures:
        if len(paths) > 1:
            typer.echo(f"parnet: {len(failures)} of {len(paths)} images could not be classified", err=True)
        raise typer.Exit(1)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def classified(
    network: DeployedParNet | QuantizedParNet, paths: list[str], top: int, batch: int, workers: int
) -> Iterator[tuple[list[Result], list[str]]]:
    """(results, errors) of each batch, in the order of `paths`. One bad picture costs that picture.

    Raises:
        OSError: a process that decodes was killed.
    """
    p, head = network.preprocessing, network.head_weight
    assert p is not None
    names = network.class_names or tuple(map(str, range(network.num_classes)))
    chunks = decoded(paths, p, batch, workers)
    while True:
        try:
            chunk = next(chunks, None)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise OSError("a process that decodes images was killed, perhaps for want of memory") from error
        if chunk is None:
            return
        errors = [reason for _, reason in chunk.errors]
        found: list[Result] = []
        if chunk.paths:
            with torch.inference_mode():
                x = normalised([*torch.from_numpy(chunk.pixels)], p)
                logits = network(x.to(head.device, head.dtype)).float()
                finite = logits.isfinite().all(1).tolist()
                scores, classes = logits.softmax(1).topk(top, 1)
            for path, good, row, values in zip(chunk.paths, finite, classes.tolist(), scores.tolist(), strict=True):
                if not good:
                    errors.append(f"{path}: the network's outputs are not finite ({head.dtype})")
                    continue
                guesses = zip(row, values, strict=True)
                found.append(Result(path, [{"class": c, "label": names[c], "probability": v} for c, v in guesses]))
        yield found, errors


@contextmanager
def _together(share: Share) -> Iterator[list[str]]:
    """For errors. Processes of torchrun end together: it would stop the others when the first ends with an error."""
    joins = share.world > 1 and dist.is_available() and dist.is_torchelastic_launched()
    if joins:
        # The others start now, and end when their share is done.
        try:
            store, rank, world = next(dist.rendezvous("env://", timeout=START))
        except dist.DistError as error:
            raise OSError(f"not all {share.world} processes of torchrun started within {START}: {error}") from error
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(days=30))
    yield []
    if joins:
        dist.barrier()
        dist.destroy_process_group()


@contextmanager
def _progress(total: int, wanted: bool) -> Iterator[tuple[Callable[[int], None], Callable[[str], None]]]:
    """(what moves the bar, what tells a line above it): on a terminal, if results go elsewhere."""
    console = Console(stderr=True)
    if not (wanted and console.is_terminal):
        yield lambda n: None, lambda line: typer.echo(line, err=True)
        return
    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        yield (
            lambda n: progress.update(task, advance=n),
            lambda line: progress.console.print(Text(line), soft_wrap=True),
        )
