"""The command line: `python -m bench`, `make bench`, `parnet bench`."""

from __future__ import annotations

import datetime
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import calls as public_calls
from bench import machine as machines
from bench import profile as layer_profile
from bench import report
from bench.engines import ENGINES
from bench.measure import Bench, Plan, Row
from bench.workloads import BLOCKS, Workload, select
from parnet_kernels.config import VARIANTS

SUITES = {"": ["net", "blocks"], "net": ["net"], "blocks": ["blocks"], "ops": ["ops"], "all": ["net", "ops"]}
GPU_ENGINES = "eager-cl,compile,compile-max,tensorrt,ours-triton,ours"


def _list(option: str, text: str, allowed: list[str]) -> list[str]:
    found = [part.strip().lower() for part in text.split(",") if part.strip()]
    if unknown := [part for part in found if part not in allowed]:
        raise typer.BadParameter(f"{unknown} not among {allowed}", param_hint=option)
    if not found:
        raise typer.BadParameter("is empty", param_hint=option)
    return found


def _numbers(option: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter("must be numbers, such as 1,8", param_hint=option) from None
    if min(found) < 1:
        raise typer.BadParameter("must be at least 1", param_hint=option)
    return found


def run(
    workloads: list[Workload],
    thread_counts: list[int],
    engines: list[str],
    plan: Plan,
    machine: machines.Machine,
    console: Console,
    minutes: float,
) -> Iterator[Row]:
    """Measures cell by cell; stops at `minutes`, and says so."""
    cells = [(workload, threads) for workload in workloads for threads in thread_counts]
    deadline = time.monotonic() + 60 * minutes
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with (
        tempfile.TemporaryDirectory(prefix="parnet-bench-") as folder,
        Progress(*columns, console=console) as bar,
    ):
        bench = Bench(engines, machine, plan, Path(folder))
        task = bar.add_task("starting", total=len(cells), left="")
        start = time.monotonic()
        try:
            for done, (workload, threads) in enumerate(cells):
                if time.monotonic() > deadline:
                    console.print(f"{minutes:g} minutes are over: {len(cells) - done} cells left out", style="yellow")
                    return
                where = f"{workload.title}, batch {workload.batch}, {threads} thr."

                def say(what: str, where: str = where) -> None:
                    bar.update(task, description=f"{where}: {what}")

                yield from bench.cell(workload, threads, say)
                each = (time.monotonic() - start) / (done + 1)
                left = min(each * (len(cells) - done - 1), deadline - time.monotonic())
                bar.update(task, advance=1, left=f"about {left / 60:.0f} min left")
        finally:
            bench.close()


def main(
    suite: Annotated[
        str,
        typer.Option(
            help="net (whole networks), blocks (one of each stream), ops (all layers) or all (net and ops); default: "
            "net and blocks. With --device cuda: ops, net, train, levels or all, the default"
        ),
    ] = "",
    variants: Annotated[str, typer.Option(help="of s,m,l,xl; default: s,m, with --device cuda all")] = "",
    batch: Annotated[str, typer.Option(help="batch sizes; default: 1,8, with --device cuda 1,8,32")] = "",
    threads: Annotated[str, typer.Option(help="numbers of threads; default: 1 and the number of cores")] = "",
    engines: Annotated[
        str, typer.Option(help=f"of {','.join(ENGINES)}; with --device cuda of {GPU_ENGINES}; default: all")
    ] = "",
    quick: Annotated[
        bool,
        typer.Option("--quick", help="ParNet-S and its blocks, batch 1, all cores, no torch.compile: about a minute"),
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="instead, time the layers of our networks within a run")
    ] = False,
    calls: Annotated[
        bool, typer.Option("--calls", help="instead, what public operators cost beside calls with packed weights")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="rounds over all engines; default 7, with --quick 3")
    ] = None,
    minutes: Annotated[float, typer.Option(help="stop after this time, keeping what is measured")] = 90,
    isa: Annotated[
        str, typer.Option(help="native, or avx2: hide AVX-512 from all engines (on x86-64 Linux, where it can be)")
    ] = "native",
    size: Annotated[int, typer.Option(min=1, help="height and width of the images")] = 224,
    out: Annotated[Path | None, typer.Option(help="folder; default out/bench/<time>")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtypes: Annotated[str, typer.Option(help="with --device cuda: of fp16,bf16,tf32,fp32")] = "fp16,bf16,tf32,fp32",
    modes: Annotated[str, typer.Option(help="with --device cuda: of warm,cold,graph")] = "warm,cold,graph",
) -> None:
    """Latency of ParNet on the CPU, or a GPU: this package against the engines one would use instead.

    An engine's result is compared with a float64 reference first; no time is given for a wrong one. Writes tables, CSV,
    JSON and plots. The default, README's table and the blocks of ParNet-S and M, takes twenty minutes, --quick about a
    minute, everything (--suite all --variants s,m,l,xl --minutes 300) several hours. Networks come first, then single
    layers. How to read the numbers: see the package's docstring, bench/__init__.py.
    """
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = out or Path("out") / "bench" / stamp
    if device != "cpu":
        _list("--device", device, ["cpu", "cuda"])
        if profile or calls or threads or isa != "native":
            raise typer.BadParameter(
                "does not go with --device cuda", param_hint="--profile, --calls, --threads or --isa"
            )
        _on_gpu(
            suite or "all",
            variants or ",".join(VARIANTS),
            batch,
            size,
            dtypes,
            modes,
            engines,
            quick,
            rounds,
            minutes,
            folder,
        )
    if suite not in SUITES:
        raise typer.BadParameter(f"{suite!r} not among {list(SUITES)[1:]}", param_hint="--suite")
    if calls and (profile or suite == "net"):
        raise typer.BadParameter("goes with single layers, not with --profile or --suite net", param_hint="--calls")
    cores = machines.physical_cores()
    chosen = select(
        ["net"] if profile else SUITES[suite or "blocks"] if calls else SUITES[suite],
        _list("--variants", "s" if quick else variants or "s,m", list(VARIANTS)),
        _numbers("--batch", "1" if quick else batch or "1,8"),
        size,
    )
    counts = _numbers("--threads", threads) if threads else [cores] if quick else sorted({1, cores})
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    hidden = _list("--isa", isa, ["native", "avx2"]) == ["avx2"]
    if hidden and (profile or calls):
        raise typer.BadParameter("does not go with --profile or --calls: PARNET_CPU_ISA does", param_hint="--isa")
    machine = machines.describe(hidden)
    plan = Plan(rounds=rounds or (3 if quick else 7), cold_bytes=machine.cold_bytes)
    wanted = _list("--engines", engines, list(ENGINES)) if engines else list(ENGINES)
    if quick and not engines:
        wanted = [name for name in wanted if not name.startswith("compile")]
    names = [name for name in ENGINES if name in wanted]
    rows: list[Row] = []
    try:
        with machines.avx512_hidden() if hidden else nullcontext():
            if calls:
                _calls([w for w in chosen if w.suite == "ops"], counts, plan, machine, console)
                return
            machines.measure_ceilings(machine, counts)
            if profile:
                _profile(chosen, counts, plan.rounds, machine, console)
                return
            for row in run(chosen, counts, names, plan, machine, console, minutes):
                rows.append(row)
    except KeyboardInterrupt:
        console.print("interrupted: what is measured is kept", style="yellow")
    except machines.CannotHideError as error:
        raise typer.BadParameter(str(error), param_hint="--isa") from None
    if not rows:
        raise typer.Exit(1)
    report.show(console, rows, machine)
    paths = report.write(rows, machine, folder)
    for path in paths:
        console.print(f"wrote {path}", highlight=False, markup=False)
    if not any(path.suffix == ".png" for path in paths):
        console.print("no plots: no right result, or matplotlib is not installed", style="yellow")


def _on_gpu(
    suite: str,
    variants: str,
    batch: str,
    size: int,
    dtypes: str,
    modes: str,
    engines: str,
    quick: bool,
    rounds: int | None,
    minutes: float,
    folder: Path,
) -> NoReturn:
    """--device cuda: `bench.gpu`. --quick: ParNet-S and its blocks, batch 1, fp16, no autotuning."""
    from bench.gpu import main as gpu
    from bench.gpu.measure import GpuPlan

    known = list(gpu.ENGINES)
    request = gpu.Request(
        list(gpu.SUITES) if suite == "all" else _list("--suite", suite, list(gpu.SUITES)),
        _list("--variants", "s" if quick else variants, list(VARIANTS)),
        _numbers("--batch", "1" if quick else batch or "1,8,32"),
        size,
        _list("--dtypes", "fp16" if quick else dtypes, list(gpu.DTYPES)),
        _list("--modes", modes, list(gpu.MODES)),
        _list("--engines", engines, known) if engines else [n for n in known if not quick or n != "compile-max"],
        GpuPlan(rounds=rounds or (3 if quick else 7)),
        minutes,
        BLOCKS if quick else None,
    )
    raise typer.Exit(gpu.run(request, folder, Console() if Console().is_terminal else Console(width=200)))


def _profile(
    workloads: list[Workload], thread_counts: list[int], rounds: int, machine: machines.Machine, console: Console
) -> None:
    with tempfile.TemporaryDirectory(prefix="parnet-bench-") as folder:
        for workload in workloads:
            for threads in thread_counts:
                times, whole = layer_profile.profile(workload, threads, Path(folder), rounds)
                ceilings = machine.ceilings.get(threads)
                console.print(layer_profile.table(workload, threads, times, whole, ceilings))
    console.print(machine.line(), style="dim", highlight=False)


def _calls(
    workloads: list[Workload], thread_counts: list[int], plan: Plan, machine: machines.Machine, console: Console
) -> None:
    with tempfile.TemporaryDirectory(prefix="parnet-bench-") as folder:
        rows = [
            (workload, threads, public_calls.measure(workload, threads, plan.cold_bytes, Path(folder), plan.rounds))
            for workload in workloads
            for threads in thread_counts
        ]
    console.print(public_calls.table(rows))
    console.print(machine.line(), style="dim", highlight=False)


app = typer.Typer()
app.command()(main)

if __name__ == "__main__":
    app()
