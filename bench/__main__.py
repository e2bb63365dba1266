"""The command line: `python -m bench cpu | int8 | train | ablation | gpu | …`, `make bench`, `parnet bench`."""

from __future__ import annotations

import datetime
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench import calls as public_calls
from bench import machine as machines
from bench import profile as layer_profile
from bench import report, tables
from bench import train as steps
from bench.engines import ENGINES, LOW_PRECISION
from bench.measure import Bench, Plan, Row
from bench.workloads import BLOCKS, Workload, select
from parnet_kernels.app.console import print_table
from parnet_kernels.config import VARIANTS

SUITES = {"": ["net", "blocks"], "net": ["net"], "blocks": ["blocks"], "ops": ["ops"], "all": ["net", "ops"]}
GPU_ENGINES = "eager-cl,compile,compile-max,tensorrt,ours-triton,ours"

Variants = Annotated[str, typer.Option(help=f"of {','.join(VARIANTS)}")]
Batch = Annotated[str, typer.Option(help="batch sizes")]
Threads = Annotated[str, typer.Option(help="numbers of threads; default: 1 and the number of cores")]
Size = Annotated[int, typer.Option(min=1, help="height and width of the images")]
Rounds = Annotated[int, typer.Option(min=1, help="rounds over everything that is compared")]
Minutes = Annotated[float, typer.Option(help="stop after this time, keeping what is measured")]
Isa = Annotated[
    str, typer.Option(help="native, or avx2: hide AVX-512 from all engines (on x86-64 Linux, where it can be)")
]
Out = Annotated[Path | None, typer.Option(help="folder; default out/bench/<time>")]

app = typer.Typer(
    help="Speed of ParNet and its layers. How to read the numbers: bench/__init__.py.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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


def _threads(text: str) -> list[int]:
    return _numbers("--threads", text) if text else sorted({1, machines.physical_cores()})


def _suites(suite: str, allowed: list[str]) -> list[str]:
    if suite not in ("", *allowed):
        raise typer.BadParameter(f"{suite!r} not among {allowed}", param_hint="--suite")
    return SUITES[suite]


def _folder(out: Path | None) -> Path:
    return out or Path("out") / "bench" / datetime.datetime.now().strftime("%Y%m%d-%H%M%S")


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
    with tempfile.TemporaryDirectory(prefix="parnet-bench-") as folder, tables.progress() as bar:
        bench = Bench(engines, machine, plan, Path(folder))
        task = bar.add_task("starting", total=len(cells), left="")
        start = time.monotonic()
        try:
            for done, (workload, threads) in enumerate(cells):
                if time.monotonic() > deadline:
                    told = f"{minutes:g} minutes are over: {len(cells) - done} cells left out"
                    console.print(told, style="yellow", highlight=False)
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


@app.command()
def cpu(
    suite: Annotated[
        str,
        typer.Option(
            help="net (whole networks), blocks (one of each stream), ops (all layers) or all (net and ops); default: "
            "net and blocks"
        ),
    ] = "",
    variants: Variants = "s,m",
    batch: Batch = "1,8",
    threads: Threads = "",
    engines: Annotated[str, typer.Option(help=f"of {','.join(ENGINES)}; default: all")] = "",
    quick: Annotated[
        bool,
        typer.Option("--quick", help="ParNet-S and its blocks, batch 1, all cores, no torch.compile: about a minute"),
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="rounds over all engines; default 7, with --quick 3")
    ] = None,
    minutes: Minutes = 90,
    isa: Isa = "native",
    size: Size = 224,
    out: Out = None,
) -> None:
    """Latency on the CPU: this package against the engines one would use instead.

    An engine's result is compared with a float64 reference first; no time is given for a wrong one. Writes tables, CSV,
    JSON and plots. The default, README's table and the blocks of ParNet-S and M, takes twenty minutes, --quick about a
    minute, everything (--suite all --variants s,m,l,xl --minutes 300) several hours. Networks come first, then single
    layers.
    """
    suites = _suites(suite, list(SUITES)[1:])
    wanted = _list("--engines", engines, list(ENGINES)) if engines else list(ENGINES)
    _cpu(report.CPU, suites, variants, batch, threads, wanted, bool(engines), quick, rounds, minutes, isa, size, out)


@app.command()
def int8(
    variants: Variants = "s,m",
    batch: Batch = "1,8",
    threads: Threads = "",
    engines: Annotated[str, typer.Option(help=f"of {','.join(LOW_PRECISION)}; default: all")] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="ParNet-S, batch 1, all cores, no torch.compile: about two minutes")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="rounds over all engines; default 7, with --quick 3")
    ] = None,
    minutes: Minutes = 90,
    isa: Isa = "native",
    size: Size = 224,
    out: Out = None,
) -> None:
    """Latency of whole networks in int8 and bfloat16 on the CPU, beside our float32 network.

    Engines take turns, but are compared within their group only: int8 or bf16. The error is that against the float64
    reference, quantisation included; an engine that has several ways takes its fastest. `peers` and NNCF, where they
    are installed, are measured.
    """
    wanted = _list("--engines", engines, list(LOW_PRECISION)) if engines else list(LOW_PRECISION)
    _cpu(report.LOW, ["net"], variants, batch, threads, wanted, bool(engines), quick, rounds, minutes, isa, size, out)


def _cpu(
    subject: report.Subject,
    suites: list[str],
    variants: str,
    batch: str,
    threads: str,
    wanted: list[str],
    chosen_engines: bool,
    quick: bool,
    rounds: int | None,
    minutes: float,
    isa: str,
    size: int,
    out: Path | None,
) -> None:
    """Options as `cpu` has them."""
    chosen = select(
        suites,
        _list("--variants", "s" if quick else variants, list(VARIANTS)),
        _numbers("--batch", "1" if quick else batch),
        size,
    )
    counts = [machines.physical_cores()] if quick and not threads else _threads(threads)
    hidden = _list("--isa", isa, ["native", "avx2"]) == ["avx2"]
    if quick and not chosen_engines:
        wanted = [name for name in wanted if not name.startswith("compile")]
    names = [name for name in subject.engines if name in wanted]
    console = Console()
    machine = machines.describe(hidden)
    plan = Plan(rounds=rounds or (3 if quick else 7), cold_bytes=machine.cold_bytes)
    rows: list[Row] = []
    try:
        with machines.avx512_hidden() if hidden else nullcontext():
            machines.measure_ceilings(machine, counts)
            for row in run(chosen, counts, names, plan, machine, console, minutes):
                rows.append(row)
    except KeyboardInterrupt:
        console.print("interrupted: what is measured is kept", style="yellow")
    except machines.CannotHideError as error:
        raise typer.BadParameter(str(error), param_hint="--isa") from None
    if not rows:
        raise typer.Exit(1)
    report.show(console, rows, machine, subject)
    paths = report.write(rows, machine, _folder(out), subject)
    notes = Console(stderr=True)
    for path in paths:
        notes.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    if not any(path.suffix == ".png" for path in paths):
        notes.print("no plots: no right result, or matplotlib is not installed", style="yellow")


@app.command()
def train(
    nets: Annotated[str, typer.Option(help=f"of {','.join(steps.NETS)}")] = "s,cifar",
    threads: Threads = "",
    engines: Annotated[str, typer.Option(help=f"of {','.join(steps.ENGINES)}; default: all")] = "",
    batch: Annotated[int, typer.Option(min=0, help="0: 8, for cifar 128")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="rounds over all engines")] = 5,
    size: Size = 224,
) -> None:
    """Training steps on the CPU, forward, backward and SGD: time and peak memory.

    Gradients are compared with float64 first; no time is given for wrong ones. The default takes about ten minutes.
    """
    names = _list("--engines", engines, list(steps.ENGINES)) if engines else list(steps.ENGINES)
    console = Console()
    for net in _list("--nets", nets, list(steps.NETS)):
        small = net == "cifar"
        for count in _threads(threads):
            rows = steps.cell(net, batch or (128 if small else 8), 32 if small else size, count, names, rounds)
            for line in steps.lines(rows):
                console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def ablation(
    data: Annotated[str, typer.Argument(help="pictures, as for parnet train; digits")] = "digits",
    rows: Annotated[str, typer.Option(help="numbers of rows, such as 0,3; default: all")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="runs of each row")] = 3,
    width: Annotated[int, typer.Option(min=2, help="of the first stream of the base")] = 16,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    batch: Annotated[int, typer.Option(min=2)] = 64,
    lr_base: Annotated[float, typer.Option(help="peak learning rate of a batch of 256")] = 0.4,
    limit: Annotated[int, typer.Option(help="training pictures of each class; 0: all")] = 500,
    validation: Annotated[int, typer.Option(help="validation pictures, spread over all; 0: all")] = 2000,
    size: Annotated[int, typer.Option(min=1, help="of the pictures")] = 32,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    minutes: Minutes = 600,
    out: Out = None,
) -> None:
    """Accuracy of ParNets that differ in one thing, trained alike; and of a ResNet. See bench/ablation.py."""
    from bench import ablation as what
    from parnet_kernels.train.settings import settings
    from parnet_kernels.train.sources import pictures

    names = list(what.ROWS)
    if rows:
        names = [names[int(i)] for i in _list("--rows", rows, [str(i) for i in range(len(names))])]
    chosen = settings({
        "data": data, "recipe": "cifar", "width": width, "epochs": epochs, "batch": batch, "lr_base": lr_base,
        "limit": limit, "size": size, "threads": threads, "pad": size // 8,
    })  # fmt: skip
    found = pictures(data, chosen.val_fraction, limit, 0)
    if validation:
        found = found._replace(validation=found.validation[:: max(1, len(found.validation) // validation)][:validation])
    folder, console = _folder(out), Console()
    with tables.progress() as bar:
        task = bar.add_task("starting", total=len(names) * seeds, left="")

        def tell(text: str) -> None:
            bar.update(task, description=text)

        results = []
        for result in what.run(chosen, found, names, seeds, minutes, folder, tell):
            results.append(result)
            bar.update(task, advance=int(result.row in names))
    print_table(console, what.HEADER, what.table(results))
    told = f"# {len(found.train)} training and {len(found.validation)} validation pictures of {data}, {epochs} epochs"
    console.print(f"{told}, batch {batch}, width {width}; {folder}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def gpu(
    suite: Annotated[str, typer.Option(help="net, ops, train (steps), levels (launches) or all")] = "all",
    variants: Variants = "s,m,l,xl",
    batch: Batch = "1,8,32",
    dtypes: Annotated[str, typer.Option(help="of fp16,bf16,tf32,fp32")] = "fp16,bf16,tf32,fp32",
    modes: Annotated[str, typer.Option(help="of warm,cold,graph")] = "warm,cold,graph",
    engines: Annotated[str, typer.Option(help=f"of {GPU_ENGINES}; default: all")] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="ParNet-S and its blocks, batch 1, fp16, no autotuning")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="rounds over all engines; default 7, with --quick 3")
    ] = None,
    minutes: Minutes = 90,
    size: Size = 224,
    out: Out = None,
) -> None:
    """Latency on a CUDA device, of training steps too; each launch beside its model."""
    from bench.gpu import main
    from bench.gpu.measure import GpuPlan

    known = list(main.ENGINES)
    request = main.Request(
        list(main.SUITES) if suite == "all" else _list("--suite", suite, list(main.SUITES)),
        _list("--variants", "s" if quick else variants, list(VARIANTS)),
        _numbers("--batch", "1" if quick else batch),
        size,
        _list("--dtypes", "fp16" if quick else dtypes, list(main.DTYPES)),
        _list("--modes", modes, list(main.MODES)),
        _list("--engines", engines, known) if engines else [n for n in known if not quick or n != "compile-max"],
        GpuPlan(rounds=rounds or (3 if quick else 7)),
        minutes,
        BLOCKS if quick else None,
    )
    raise typer.Exit(main.run(request, _folder(out), Console()))


@app.command()
def convolutions(
    variants: Variants = "s",
    batch: Batch = "64,256",
    dtypes: Annotated[str, typer.Option(help="of fp16,bf16,tf32,fp32")] = "fp16,bf16,tf32",
    size: Size = 224,
    rounds: Rounds = 3,
    minutes: Minutes = 10,
    write: Annotated[
        bool, typer.Option("--write", help="add the choices to the table that training reads on this model of GPU")
    ] = False,
    out: Out = None,
) -> None:
    """The convolutions of training steps on a CUDA device, the library's beside ours: which to take.

    Both are compared with each other first. See bench/gpu/convolutions.py.
    """
    from bench.gpu import convolutions as what
    from bench.gpu.tasks import DTYPES

    request = what.Request(
        _list("--variants", variants, list(VARIANTS)),
        _numbers("--batch", batch),
        size,
        _list("--dtypes", dtypes, list(DTYPES)),
        rounds,
        minutes,
    )
    raise typer.Exit(what.main(request, _folder(out), write, Console()))


@app.command()
def profile(
    variants: Variants = "s,m",
    batch: Batch = "1,8",
    threads: Threads = "",
    rounds: Rounds = 7,
    size: Size = 224,
) -> None:
    """Time of each layer within a run of our whole network."""
    chosen = select(["net"], _list("--variants", variants, list(VARIANTS)), _numbers("--batch", batch), size)
    counts = _threads(threads)
    console, machine = Console(), machines.describe()
    machines.measure_ceilings(machine, counts)
    with tempfile.TemporaryDirectory(prefix="parnet-bench-") as folder:
        for workload in chosen:
            for count in counts:
                times, whole = layer_profile.profile(workload, count, Path(folder), rounds)
                layer_profile.show(console, workload, count, times, whole, machine.ceilings.get(count))
    report.conditions(console, machine.line(), machine.ceilings_line())


@app.command()
def calls(
    suite: Annotated[str, typer.Option(help="blocks (one of each stream) or ops (all layers)")] = "blocks",
    variants: Variants = "s,m",
    batch: Batch = "1,8",
    threads: Threads = "",
    rounds: Rounds = 7,
    size: Size = 224,
) -> None:
    """What public operators cost beside calls with packed weights."""
    suites = _suites(suite, ["blocks", "ops"])
    chosen = select(suites, _list("--variants", variants, list(VARIANTS)), _numbers("--batch", batch), size)
    cells = [(workload, count) for workload in chosen if workload.suite == "ops" for count in _threads(threads)]
    console, machine = Console(), machines.describe()
    rows = []
    with tempfile.TemporaryDirectory(prefix="parnet-bench-") as folder, tables.progress() as bar:
        task = bar.add_task("", total=len(cells), left="")
        for workload, count in cells:
            bar.update(task, description=f"{workload.title}, batch {workload.batch}, {count} thr.")
            time_ = public_calls.measure(workload, count, machine.cold_bytes, Path(folder), rounds)
            rows.append((workload, count, time_))
            bar.update(task, advance=1)
    public_calls.show(console, rows)
    report.conditions(console, machine.line())


if __name__ == "__main__":
    app(prog_name="python -m bench")
