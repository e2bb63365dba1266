"""`parnet plan`: when several devices pay, by the cost model."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from parnet_kernels.app.console import print_table
from parnet_kernels.config import VARIANTS, ParNetConfig
from parnet_kernels.distributed.cost import Device, Link, Model
from parnet_kernels.distributed.machines import DEVICES, LINKS, Machine

SIZES = (224, 320, 512, 1024)
BATCHES = (1, 2, 4, 8, 16, 32)
NONE: tuple[()] = ()


def devices_of(text: str) -> tuple[Machine, int]:
    """`NAME:COUNT`.

    Raises:
        typer.BadParameter: for anything else.
    """
    name, _, count = text.partition(":")
    if name not in DEVICES or not count.isdecimal() or not 2 <= int(count) <= 8:
        raise typer.BadParameter(
            f"devices must be NAME:COUNT, NAME of {', '.join(DEVICES)}, COUNT 2 to 8, got {text!r}"
        )
    return DEVICES[name], int(count)


def link_of(text: str) -> Link:
    """A name, or `MICROSECONDS,GIGABYTES` (a second, in one direction).

    Raises:
        typer.BadParameter: for anything else.
    """
    if text in LINKS:
        return LINKS[text]
    try:
        latency, bandwidth = map(float, text.split(","))
        if 0 <= latency < 1e9 and 0 < bandwidth < 1e9:
            return Link(latency * 1e-6, bandwidth * 1e9)
    except ValueError:
        pass
    raise typer.BadParameter(f"link must be one of {', '.join(LINKS)}, or MICROSECONDS,GIGABYTES, got {text!r}")


def compare(config: ParNetConfig, size: int, batch: int, machine: Machine, count: int, link: Link) -> dict[str, float]:
    """Modelled seconds of one device, of streams on `count` devices (at most one a stream) and of data parallel."""
    device: Device = machine.device

    def model(images: int) -> Model:
        return Model(config, (images, config.in_chans, size, size), machine.itemsize, machine.itemsize)

    whole, ranks = model(batch), min(count, config.streams)
    share = -(-batch // count)
    return {
        "one device": whole.single_time(device),
        "streams": whole.time(whole.best(ranks, device, link), device, link),
        "data parallel": model(share).single_time(device) + (link.latency if share < batch else 0.0),
    }


def plan(
    devices: Annotated[str, typer.Option(help=f"NAME:COUNT, NAME one of {', '.join(DEVICES)}.")] = "a100:3",
    link: Annotated[
        str, typer.Option(help=f"One of {', '.join(LINKS)}; or MICROSECONDS,GIGABYTES a second.")
    ] = "nvlink3",
    variant: Annotated[list[str] | None, typer.Option(help="s, m, l, xl; may be repeated. Default: all.")] = None,
    size: Annotated[list[int] | None, typer.Option(min=1, max=8192, help="Pixels of a side; may be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, max=4096, help="Images; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Modelled times of one device, of streams in parallel and of data parallel, and where one overtakes the other."""
    machine, count = devices_of(devices)
    wire = link_of(link)
    for name in variant or NONE:
        if name not in VARIANTS:
            raise typer.BadParameter(f"variant must be one of {', '.join(VARIANTS)}, got {name!r}")
    results: list[dict[str, Any]] = []
    for name in variant or VARIANTS:
        for side in size or SIZES:
            before = "streams"
            for images in sorted(batch or BATCHES):
                times = compare(VARIANTS[name], side, images, machine, count, wire)
                fastest = min(times, key=lambda way: times[way])
                entry = {"variant": name, "size": side, "batch": images}
                entry |= {way: round(1e3 * seconds, 4) for way, seconds in times.items()}
                entry |= {"fastest": fastest, "break-even": before == "streams" and fastest == "data parallel"}
                before = fastest if fastest != "one device" else before
                results.append(entry)
    note = f"modelled, in ms: {count} × {machine.what}; link: {1e6 * wire.latency:g} µs, {wire.bandwidth / 1e9:g} GB/s"
    if as_json:
        typer.echo(json.dumps({"modelled": note, "results": results}, indent=2))
        return
    typer.echo(note)
    header = ("network", "size", "batch", "one device", "streams", "data parallel", "fastest, modelled")
    rows = [
        (
            f"ParNet-{entry['variant'].upper()}",
            entry["size"],
            entry["batch"],
            *(f"{entry[way]:.3f}" for way in ("one device", "streams", "data parallel")),
            entry["fastest"] + (", break-even" if entry["break-even"] else ""),
        )
        for entry in results
    ]
    print_table(Console(), header, rows)
