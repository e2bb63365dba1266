"""The `parnet` command: info, demo, predict, convert, bench."""

from __future__ import annotations

import json
import platform
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from parnet_kernels import _native, checks, dispatch, ops
from parnet_kernels._version import __version__
from parnet_kernels.app.console import print_table, shown
from parnet_kernels.checkpoint import CheckpointError, load_checkpoint, load_model, save

app = typer.Typer(
    help="ParNet (Non-deep Networks) with fused kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()


class Activation(StrEnum):
    silu = "silu"
    relu = "relu"


CheckpointArgument = Annotated[Path, typer.Argument(help="Training checkpoint (.pth) or safetensors file.")]
EmaOption = Annotated[bool, typer.Option("--ema", help="Take the EMA weights of a training checkpoint.")]
ActivationOption = Annotated[
    Activation | None,
    typer.Option(help="Activation the checkpoint was trained with; default: what the file says, else SiLU."),
]


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
        "cpu": _native.cpu_error or json.loads(torch.ops.parnet._cpu_info()),
        "cuda_library": _native.cuda_error or f"built for sm_{torch.ops.parnet._cuda_info().replace(' ', ', sm_')}",
    }


def _choice(call: str) -> dict[str, Any]:
    """`call` as in `parnet info --why` → for each backend, in order of preference, what it says to this call."""
    match = re.fullmatch(r"(\w+),(\d+)x(\d+)x(\d+)x(\d+),(\w+),([\w:]+)", call)
    dtype = getattr(torch, match[6], None) if match else None
    if match is None or match[1] not in dispatch.OPERATORS or not isinstance(dtype, torch.dtype):
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
) -> None:
    """Train a small ParNet on handwritten digits, deploy it, compare and time; exits 1 if a check fails."""
    try:
        from parnet_kernels.app.demo import run
    except ImportError as error:
        raise typer.BadParameter(f"the demo needs `pip install parnet-kernels[demo]`: {error}") from error
    out.mkdir(parents=True, exist_ok=True)  # fails before the training, not after it
    if not run(out, console):
        raise typer.Exit(1)


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    checkpoint: Annotated[Path, typer.Option(help="Training checkpoint (.pth) or safetensors file.")],
    size: Annotated[int, typer.Option(min=1, max=8192, help="Pixels of the square the network sees.")] = 224,
    crop: Annotated[float, typer.Option(min=0.01, max=1, help="That square's share of the resized image.")] = 0.875,
    top: Annotated[int, typer.Option(min=1, help="Classes to print for each image.")] = 5,
    labels: Annotated[Path | None, typer.Option(help="Text file with one class name a line.")] = None,
    ema: EmaOption = False,
    activation: ActivationOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Classify images."""
    from parnet_kernels.app.images import load_image

    if size / crop > 16384:
        raise typer.BadParameter(f"size / crop must be at most 16384 pixels, got {size} / {crop}")

    network = load_model(checkpoint, ema, activation and activation.value)
    if not network.num_classes:
        raise CheckpointError(f"{checkpoint} has no classifier")
    names = _class_names(labels) if labels else [str(i) for i in range(network.num_classes)]
    if len(names) != network.num_classes:
        raise typer.BadParameter(f"{labels} names {len(names)} classes, the network has {network.num_classes}")
    results: list[dict[str, Any]] = []
    failed = False
    with torch.inference_mode():
        for path in images:
            try:
                image = load_image(path, size, crop, network.config.in_chans).to(network.head_weight.dtype)
                logits = network(image)[0].float()
                if not logits.isfinite().all():
                    raise ValueError(f"{path}: the network's outputs are not finite ({logits.dtype})")
            except (OSError, ValueError) as error:  # of this picture: the others are classified all the same
                typer.echo(f"parnet: {shown(error)}", err=True)
                failed = True
                continue
            scores, classes = logits.softmax(0).topk(min(top, network.num_classes))
            found = [
                {"class": c, "label": names[c], "probability": p}
                for c, p in zip(classes.tolist(), scores.tolist(), strict=True)
            ]
            results.append({"image": str(path), "top": found})
    if as_json:
        typer.echo(json.dumps(results, indent=2))
    elif results:
        rows = [
            (result["image"], entry["label"], f"{entry['probability']:.2%}")
            for result in results
            for entry in result["top"]
        ]
        print_table(console, ("image", "class", "probability"), rows)
    if failed:
        raise typer.Exit(1)


def _class_names(path: Path) -> list[str]:
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


@app.command()
def convert(
    checkpoint: CheckpointArgument,
    output: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    deployed: Annotated[bool, typer.Option("--deployed", help="Fold into the inference form.")] = False,
    ema: EmaOption = False,
    activation: ActivationOption = None,
) -> None:
    """Convert a training checkpoint to safetensors, in training or deployed form."""
    if output.suffix != ".safetensors":
        raise typer.BadParameter(f"output must end in .safetensors, got {output}")
    model = load_checkpoint(checkpoint, ema, activation and activation.value)
    save(model.deploy() if deployed else model, output)
    form = "deployed" if deployed else "training"
    widths = ", ".join(map(str, model.config.planes))
    typer.echo(f"{shown(output)}: {form} form, planes {widths}, activation {model.config.activation}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Measure speed against other engines (`parnet bench --help`); needs the source checkout."""
    checkout = Path(__file__).parents[2]
    if not (checkout / "bench" / "__main__.py").is_file():
        raise typer.BadParameter("the benchmark is not part of the installed package: run it from a source checkout")
    sys.path.insert(0, str(checkout))
    from bench.__main__ import app as benchmark

    benchmark(context.args, prog_name="parnet bench")


def main() -> None:
    """The entry point: what a user can mend is one line on standard error and exit status 1."""
    try:
        app()
    except (CheckpointError, OSError, ValueError) as error:
        print(f"parnet: {shown(error)}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        told = re.search(r"PARNET_CPU_ISA must.*", str(error))
        if told is None:
            raise
        print(f"parnet: {told[0]}", file=sys.stderr)
        sys.exit(1)
