"""The `parnet` command: info, demo, train, predict, latency, plan, quantize, convert, export, bench."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from parnet_kernels import _native, checks, ops
from parnet_kernels._version import __version__
from parnet_kernels.app.console import print_table, shown
from parnet_kernels.app.export import export
from parnet_kernels.app.latency import latency
from parnet_kernels.app.options import (
    ActivationOption,
    CheckpointArgument,
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
from parnet_kernels.app.plan import plan
from parnet_kernels.app.predict import predict
from parnet_kernels.app.quantize import quantize
from parnet_kernels.app.train import command as train
from parnet_kernels.call import OPERATORS
from parnet_kernels.checkpoint import CheckpointError, load_checkpoint, load_model, save
from parnet_kernels.cpu import direct
from parnet_kernels.cpu.network import products_of_16_bits
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.model import ParNet
from parnet_kernels.triton import convolution_table, policy

app = typer.Typer(
    help="ParNet (Non-deep Networks) with fused kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()


def installation() -> dict[str, Any]:
    """What `parnet info` tells: versions, devices, and for each backend whether it is there, or why not."""
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    example = torch.empty(1, 8, 8, 8, device="cuda" if torch.cuda.is_available() else "cpu")
    backends = ops.explain("repvgg_sse", example)
    return {
        "parnet_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "devices": devices,
        "backends": {name: "available" if reason is None else reason for name, reason in backends.items()},
        "cpu": _native.cpu_error or _native.cpu_info(),
        "cpu_products": {
            "int8": direct.why_not() or direct.KERNELS[direct.choose(None)],
            "float16, bfloat16": products_of_16_bits(),
        },
        "training_convolutions": _convolutions(),
        "cuda_library": _native.cuda_error or f"built for sm_{', sm_'.join(_native.cuda_architectures())}",
    }


def _convolutions() -> str | dict[str, str]:
    """For each GPU, what is known of the convolutions that training takes there."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    return {f"cuda:{i}": convolution_table.told(policy.model(torch.device("cuda", i))) for i in devices} or "no GPU"


def _choice(call: str) -> dict[str, Any]:
    """`call` as in `parnet info --why` → for each backend, in order of preference, what it says to this call."""
    match = re.fullmatch(r"(\w+),(\d+)x(\d+)x(\d+)x(\d+),(\w+),([\w:]+)", call)
    dtype = getattr(torch, match[6], None) if match else None
    if match is None or match[1] not in OPERATORS or not isinstance(dtype, torch.dtype):
        raise typer.BadParameter(
            f"expected OP,NxCxHxW,DTYPE,DEVICE such as repvgg_sse,1x128x56x56,float32,cpu, got {call!r}"
        )
    try:
        x = torch.empty([int(n) for n in match.groups()[1:5]], dtype=dtype, device=match[7])
    except (RuntimeError, AssertionError, OverflowError, TypeError) as error:  # no such device, or more than its memory
        raise typer.BadParameter(f"no tensor for {call!r}: {str(error).splitlines()[0]}") from error
    checks.is_map("x", x)
    reasons = ops.explain(match[1], x)
    chosen = next(name for name, reason in reasons.items() if reason is None)
    return {"runs on": chosen, **{name: reason or "can run it" for name, reason in reasons.items()}}


def _selftest() -> bool:
    from parnet_kernels.app.selftest import selftest

    rows = selftest()
    cells = [
        (r.backend, r.what, f"{r.error:.1e}", f"{r.allowed:.0e}", "passed" if r.passed else f"FAILED {r.message}")
        for r in rows
    ]
    if rows:
        styles = {"passed": "green", "FAILED": "red"}
        print_table(console, ("backend", "kernel", "error", "allowed", "verdict"), cells, styles)
    else:
        console.print("no GPU: nothing to test")
    return all(row.passed for row in rows)


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    why: Annotated[
        str | None, typer.Option(help="Which backend runs a call, and why not another: OP,NxCxHxW,DTYPE,DEVICE.")
    ] = None,
    selftest: Annotated[bool, typer.Option("--selftest", help="Compare each GPU kernel with the reference.")] = False,
) -> None:
    """Versions, devices, and which backends are available, or why not."""
    if selftest:
        raise typer.Exit(0 if _selftest() else 1)
    found = installation() if why is None else _choice(why)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    rows = []
    for name, value in found.items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        for key, entry in entries:
            text = ", ".join(map(str, entry)) if isinstance(entry, list) else str(entry)
            rows.append((f"{name} {key}".strip(), text))
    print_table(console, (), rows)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture and the trained network.")] = Path("out/demo"),
    threads: ThreadsOption = None,
) -> None:
    """Train a small ParNet on handwritten digits, deploy it, compare and time; exits 1 if a check fails."""
    try:
        from parnet_kernels.app.demo import run
    except ImportError as error:
        raise typer.BadParameter(f"the demo needs `pip install parnet-kernels[demo]`: {error}") from error
    out.mkdir(parents=True, exist_ok=True)  # fails before the training, not after it
    use_threads(threads)
    if not run(out, console):
        raise typer.Exit(1)


@app.command()
def convert(
    checkpoint: CheckpointArgument,
    output: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    deployed: Annotated[bool, typer.Option("--deployed", help="Fold into the inference form.")] = False,
    labels: LabelsOption = None,
    size: SizeOption = None,
    crop: CropOption = None,
    interpolation: InterpolationOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    color: ColorOption = None,
    ema: EmaOption = False,
    activation: ActivationOption = None,
    ignore_classes: IgnoreClassesOption = False,
) -> None:
    """Convert a checkpoint to safetensors, in training or deployed form.

    The file keeps class names and preprocessing: those of the checkpoint, or what the options say.
    """
    if output.suffix != ".safetensors":
        raise typer.BadParameter(f"output must end in .safetensors, got {output}")
    load = load_model if deployed else load_checkpoint
    model: ParNet | DeployedParNet = load(checkpoint, ema, activation, ignore_classes=ignore_classes)
    asked = {"size": size, "crop": crop, "interpolation": interpolation, "mean": mean, "std": std, "color": color}
    if any(value is not None for value in asked.values()):
        model.preprocessing, told = preprocessing_of(model, checkpoint, **asked)
        typer.echo(f"parnet: {told}", err=True)
    if line := name_classes(model, labels):
        typer.echo(f"parnet: {line}", err=True)
    save(model, output)
    form = "deployed" if deployed else "training"
    widths = ", ".join(map(str, model.config.planes))
    typer.echo(f"{shown(output)}: {form} form, planes {widths}, activation {model.config.activation}")
    if model.preprocessing is None:
        typer.echo(f"parnet: {shown(output)} does not say how pictures become inputs: --size and others do", err=True)


app.command()(train)
app.command()(predict)
app.command()(export)
app.command()(quantize)
app.command()(latency)
app.command()(plan)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Measure speed against other engines (`parnet bench --help`); needs the source checkout."""
    checkout = Path(__file__).parents[2]
    if not (checkout / "bench" / "__main__.py").is_file():
        raise typer.BadParameter("the benchmark is not part of the installed package: run it from a source checkout")
    # A process of its own: the checkout is on its path, and not on that of this program.
    path = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "bench", *context.args]
    raise typer.Exit(subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode)


def main(*first: str) -> None:
    """The entry point: what a user can mend is one line on standard error and exit status 1. first: words that come
    before those of the command line.
    """
    try:
        app([*first, *sys.argv[1:]], prog_name="parnet")
    except (CheckpointError, OSError, ValueError) as error:
        print(f"parnet: {shown(error)}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        told = re.search(r"PARNET_CPU_ISA must.*", str(error))
        if told is None:
            raise
        print(f"parnet: {told[0]}", file=sys.stderr)
        sys.exit(1)
