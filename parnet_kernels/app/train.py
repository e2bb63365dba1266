"""`parnet train`: a network from a folder of pictures."""

from __future__ import annotations

import inspect
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from parnet_kernels.app.console import print_table, shown
from parnet_kernels.train.settings import FIELDS, RECIPES, read_yaml, settings

NEEDS = "training needs `pip install parnet-kernels[train]`"
TYPES: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str}


class _Screen:
    """Shows how a run goes: a bar on a terminal, and a line an epoch."""

    def __init__(self, console: Console, first: bool) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
        self._bar = Progress(
            *columns, TimeRemainingColumn(), console=console, disable=not (first and console.is_terminal)
        )
        self._task: TaskID | None = None
        self._since: tuple[float, int] | None = None
        self._left = ""
        self._interrupted = False

    @contextmanager
    def watching(self) -> Iterator[_Screen]:
        """Python drops an interrupt that arrives inside a finaliser or a callback: the next step raises it again."""

        def interrupted(number: int, frame: FrameType | None) -> None:
            self._interrupted = True
            signal.default_int_handler(number, frame)

        before = signal.getsignal(signal.SIGINT)
        ours = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
        if ours:
            signal.signal(signal.SIGINT, interrupted)
        try:
            with self._bar:
                yield self
        finally:
            if ours:
                signal.signal(signal.SIGINT, before)

    def say(self, text: str) -> None:
        self._console.print(Text(f"parnet: {shown(text)}", style="yellow"), soft_wrap=True)

    def step(self, done: int, total: int, epoch: int, loss: float, rate: float) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        about = f"epoch {epoch + 1}  loss {loss:.3f}  {rate:.0f} images/s"
        now = time.monotonic()
        if self._since is None:
            self._since = now, done
            self._task = self._bar.add_task(about, total=total, completed=done)
        elif done > self._since[1]:
            left = (now - self._since[0]) / (done - self._since[1]) * (total - done)
            self._left = f", {left / 60:.0f} min left" if left >= 90 else f", {left:.0f} s left"
        if self._task is not None:
            self._bar.update(self._task, completed=done, description=about)

    def epoch(self, row: dict[str, float]) -> None:
        top1 = "no validation" if row["top1"] != row["top1"] else f"top-1 {row['top1']:.2%}, top-5 {row['top5']:.2%}"
        self._console.print(
            f"epoch {row['epoch']:.0f}: loss {row['loss']:.4f}, {top1}, learning rate {row['lr']:.4g}, "
            f"{row['images_per_second']:.0f} images/s{self._left}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def _run(given: dict[str, Any], resume: bool) -> int:
    """The exit status."""
    try:
        from parnet_kernels.train.finish import deploy
        from parnet_kernels.train.loop import Run
        from parnet_kernels.train.ranks import joined, restarts

        chosen = settings(given)
        console = Console()
        with joined(chosen.device) as ranks:
            screen = _Screen(console if ranks.first else Console(stderr=True), ranks.first)
            run = Run(chosen, ranks, screen, resume or restarts() > 0)
            if ranks.first:
                _tell(console, run)
            try:
                if run.done < run.total:
                    run.learner.compile_kernels()  # has a line of its own: before the bar
                with screen.watching():
                    scores = run()
            except KeyboardInterrupt:
                screen.say(f"stopped after step {run.done} of {run.total}; --resume goes on from the last checkpoint")
                raise
        if not ranks.first:
            return 0
        if scores is None:
            console.print("parnet: the run was complete", highlight=False)
        files = [str(run.folder / name) for name in ("best.safetensors", "last.safetensors", "epochs.csv")]
        console.print(Text(shown(", ".join(files))), soft_wrap=True)
        if not chosen.deploy:
            return 0
        found = deploy(run.folder, run.data)
    except ImportError as error:
        raise typer.BadParameter(f"{NEEDS}: {error}") from error
    rows = [
        ("deployed network", shown(run.folder / "deployed.safetensors"), ""),
        ("its accuracy", f"{found.right / max(1, found.pictures):.2%} of {found.pictures} pictures", ""),
        ("trained and deployed agree", f"{found.agree} of {found.pictures}", ""),
        ("largest relative difference of logits", f"{found.difference:.2g}", "passed" if found.passed else "FAILED"),
    ]
    print_table(console, (), rows, {"passed": "green", "FAILED": "red"})
    return 0 if found.passed else 1


def _tell(console: Console, run: Any) -> None:
    s, data, config = run.settings, run.data, run.network.config
    parameters = sum(p.numel() for p in run.network.parameters())
    widths = ", ".join(map(str, config.planes))
    for line in (
        f"{len(data.train)} training and {len(data.validation)} validation pictures, {len(data.class_names)} classes",
        f"planes {widths}, {config.activation}, {parameters / 1e6:.2f} M parameters; {run.preprocessing}",
        f"recipe {s.recipe}: {s.epochs + s.cooldown} epochs of {run.steps} steps of {s.batch} pictures, peak learning "
        f"rate {s.lr_base * s.batch / 256:.4g}; {run.ranks.world} process(es) on {run.ranks.device.type}"
        + (f"; goes on from step {run.done}" if run.done else ""),
    ):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def train(**options: Any) -> None:
    """Train a ParNet on pictures: a folder in torchvision's layout (train/<class>/*, val/<class>/*), a zip or tar of
    one, or `digits`.

    Settings come from the recipe, then from a YAML file, whose keys are the names of the options, then from options.
    For several processes: `torchrun --nproc-per-node N -m parnet_kernels.train DATA …`.
    """
    config, resume = options.pop("config"), options.pop("resume")
    given: dict[str, Any] = {}
    if config is not None:
        try:
            given = read_yaml(config)
        except ImportError as error:
            raise typer.BadParameter(f"{NEEDS}: {error}") from error
    given |= {name: value for name, value in options.items() if value is not None}
    if not given.get("data"):
        raise typer.BadParameter("name the pictures: DATA, or `data` in the YAML file")
    if status := _run(given, resume):
        raise typer.Exit(status)


def _help(name: str) -> str:
    """What an option does, with its default and what each recipe has instead."""
    f = FIELDS[name]
    others = [f"{recipe}: {values[name]}" for recipe, values in RECIPES.items() if name in values]
    default = "" if f.default == "" or f.default is False else f" (default {', '.join([str(f.default), *others])})"
    return f.metadata["help"] + default


def _options() -> Callable[..., None]:
    """`train` with an option for each field of `Settings`."""
    found = {
        "data": Annotated[str | None, typer.Argument(help=FIELDS["data"].metadata["help"])],
        "config": Annotated[Path | None, typer.Option(help="YAML file of settings.")],
        "resume": Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")],
    }
    for name, f in FIELDS.items():
        if name != "data":
            flag = f"--{name.replace('_', '-')}"
            flag += f"/--no-{name.replace('_', '-')}" if f.type == "bool" else ""
            found[name] = Annotated[TYPES[str(f.type)] | None, typer.Option(flag, help=_help(name))]
    kind = inspect.Parameter.KEYWORD_ONLY
    defaults: dict[str, Any] = {"resume": False}
    train.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(n, kind, default=defaults.get(n), annotation=a) for n, a in found.items()]
    )
    train.__annotations__ = {**found, "return": None}
    return train


command = _options()
