"""Measures the convolutions of training steps, the library's beside ours, for the policy that chooses between them.

`python -m bench convolutions [--write]`. Each 3×3 convolution of a variant in one group, at the size it has in a step,
is timed in three roles: forward, input gradient, weight gradient. Both are called as a step calls them, with packing
(`parnet_kernels/triton/convolutions.py`), and compared with each other first; no time is given where they differ.
--write adds the choices to the table of this model of GPU, which every later process reads. A file of the same form
goes to --out in any case.
"""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from bench import tables
from bench.gpu.measure import reason_of
from bench.gpu.tasks import DTYPES, PEER_TOLERANCE, error_of, products_in
from bench.gpu.timing import Call, Device, calls_in_a_sample, sample
from parnet_kernels.config import VARIANTS, layers
from parnet_kernels.distributed.cut import sizes
from parnet_kernels.triton import convolution_table as table
from parnet_kernels.triton.convolution_table import LIBRARY, OWN

SAMPLES = 5  # of each of the two in a round
MARGIN = 0.97  # of the library's time: what ours must take to be chosen; below it the choice would follow the noise
HEADER = ("convolution", "library ms", "ours ms", "ratio", "differ by", "choice")


class Shape(NamedTuple):
    """x [N, C, H, W], weight [K, C, 3, 3]."""

    x: tuple[int, ...]
    k: int
    stride: int


@dataclass(frozen=True)
class Request:
    variants: list[str]
    batches: list[int]
    size: int
    dtypes: list[str]
    rounds: int
    minutes: float


@dataclass
class Timed:
    """One convolution in one role and number format."""

    shape: Shape
    role: str
    dtype: str
    key: str
    difference: float = float("nan")
    milliseconds: dict[str, float] = field(default_factory=dict)  # by LIBRARY and OWN
    reason: str = ""  # why there are no times

    @property
    def which(self) -> str:
        return OWN if self.milliseconds[OWN] <= MARGIN * self.milliseconds[LIBRARY] else LIBRARY

    @property
    def title(self) -> str:
        n, c, h, w = self.shape.x
        strided = f" /{self.shape.stride}" if self.shape.stride > 1 else ""
        return f"{self.role} {n}x{c}x{h}x{w} to {self.shape.k}{strided} {self.dtype}"


def products(variant: str, batch: int, size: int) -> list[tuple[Shape, str]]:
    """The convolutions of a step, with their roles; each once. Left out are those of fusions, of two groups, which ours
    do not take, and the gradient of the image, which no step asks for.
    """
    from parnet_kernels.triton.convolutions import OF_INPUT, ROLES

    config = VARIANTS[variant]
    maps = sizes(config, (batch, config.in_chans, size, size))
    found = [
        (Shape(maps[layer.inputs[0]], layer.out_channels, layer.stride), role)
        for layer in layers(config)
        if layer.kind in ("repvgg_sse", "downsample_se")
        for role in ROLES
        if role != OF_INPUT or layer.inputs != ("image",)
    ]
    return list(dict.fromkeys(found))


def calls_of(shape: Shape, role: str, dtype: str, device: torch.device) -> tuple[str, dict[str, Call]]:
    """(key in the table, both calls). Maps and weights are in channels_last, as in a step."""
    from parnet_kernels.triton import convolutions

    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        t = torch.randn(size, generator=generator, device=device).mul_(scale)
        return t.to(DTYPES[dtype], memory_format=torch.channels_last)

    x, weight = normal(*shape.x), normal(shape.k, shape.x[1], 3, 3, scale=(9 * shape.x[1]) ** -0.5)
    size = [(n - 1) // shape.stride + 1 for n in shape.x[2:]]
    d = x if role == convolutions.FORWARD else normal(shape.x[0], shape.k, *size)
    needs = role == convolutions.OF_INPUT, role == convolutions.OF_WEIGHT

    def call(which: str) -> Call:
        def run() -> Tensor:
            with torch.no_grad(), convolutions.forced(which):
                if role == convolutions.FORWARD:
                    return convolutions.forward(x, weight, shape.stride, 1)
                made = convolutions.gradients(d, x, weight, shape.stride, 1, *needs)
                return next(t for t in made if t is not None)

        return run

    return convolutions.key(role, x, weight, shape.stride), {which: call(which) for which in (LIBRARY, OWN)}


def compile_all(every: Iterable[tuple[Shape, str, str]], device: torch.device) -> int:
    """What ours launch, side by side; returns how many kernels that were."""
    from parnet_kernels.triton import compilation

    with compilation.compiling() as compiled:
        for shape, role, dtype in every:
            with products_in(dtype):
                calls_of(shape, role, dtype, device)[1][OWN]()
    return len(compiled.names)


def time_one(shape: Shape, role: str, dtype: str, device: Device, rounds: int) -> Timed:
    """Compares, then samples in turns; a failure of either is the reason why there are no times."""
    row = Timed(shape, role, dtype, "")
    try:
        row.key, calls = calls_of(shape, role, dtype, device.torch_device)
        row.difference = error_of([calls[OWN]()], [calls[LIBRARY]().double()])
        if not row.difference <= PEER_TOLERANCE[dtype][0]:
            row.reason = f"they differ: {row.difference:.1e} > {PEER_TOLERANCE[dtype][0]:.0e}"
            return row
        counts = {which: calls_in_a_sample(device, call) for which, call in calls.items()}
        found: dict[str, list[float]] = {which: [] for which in calls}
        order = [LIBRARY, OWN]
        for _ in range(rounds):
            for which in order:
                calls[which]()  # warms up
                found[which] += [sample(device, calls[which], counts[which], cold=False) for _ in range(SAMPLES)]
            order.reverse()
        row.milliseconds = {which: statistics.median(times) for which, times in found.items()}
    except Exception as error:  # such as too little memory: the others go on
        row.reason = reason_of(error)
    return row


def measure(
    request: Request, device: Device, say: Callable[[str], None], tell: Callable[[str, int, int], None]
) -> Iterator[Timed]:
    """Every convolution of the request once a key; stops at the request's minutes, and says so.

    tell: is told what is being measured, and how many of how many are done.
    """
    every = dict.fromkeys(
        (shape, role, dtype)
        for dtype in request.dtypes
        for variant in request.variants
        for batch in request.batches
        for shape, role in products(variant, batch, request.size)
    )
    if device.torch_device.type == "cuda":
        tell("compiling", 0, len(every))
        try:
            compile_all(every, device.torch_device)
        except RuntimeError as error:  # of one: the others are compiled when they are called
            say(reason_of(error))
    start = monotonic()
    for done, (shape, role, dtype) in enumerate(every):
        if monotonic() - start > 60 * request.minutes:
            say(f"{request.minutes:g} minutes are over: {len(every) - done} left out")
            return
        tell(Timed(shape, role, dtype, "").title, done, len(every))
        with products_in(dtype):
            yield time_one(shape, role, dtype, device, request.rounds)


def source(name: str) -> str:
    """Where the entries come from: device, date, versions and settings, as each entry of the table tells it."""
    import triton

    cudnn, library = torch.backends.cudnn, "MIOpen" if torch.version.hip else "cuDNN"
    versions = f"torch {torch.__version__}, triton {triton.__version__}, {library} {cudnn.version()}"
    settings = f"benchmark {cudnn.benchmark}, deterministic {cudnn.deterministic}"
    return f"python -m bench convolutions on {name}, {datetime.date.today()}, {versions}, {settings}, warm"


def entries(rows: list[Timed], told: str) -> table.Entries:
    """Of the rows with times. Of several shapes that the table does not tell apart, the slowest counts."""
    found: dict[str, Timed] = {}
    for row in rows:
        if not row.reason:
            found[row.key] = max(row, found.get(row.key, row), key=lambda r: r.milliseconds[LIBRARY])
    return {
        key: {
            "which": row.which,
            "library in ms": round(row.milliseconds[LIBRARY], 5),
            "ours in ms": round(row.milliseconds[OWN], 5),
            "difference": float(f"{row.difference:.2g}"),
            "of": row.title,
            "source": told,
        }
        for key, row in found.items()
    }


def cells(row: Timed) -> tuple[str, ...]:
    if row.reason:
        return row.title, "–", "–", "–", "–", row.reason
    library, own = row.milliseconds[LIBRARY], row.milliseconds[OWN]
    return row.title, f"{library:.3f}", f"{own:.3f}", f"{library / own:.2f}", f"{row.difference:.0e}", row.which


def run(request: Request, device: Device, name: str, console: Console) -> tuple[list[Timed], table.Entries]:
    """Measures and shows. Interrupted, it keeps what is measured."""
    rows: list[Timed] = []

    def say(text: str) -> None:
        console.print(text, style="yellow", highlight=False, soft_wrap=True)

    with tables.progress() as bar:
        task = bar.add_task("starting", total=None, left="")

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        try:
            for row in measure(request, device, say, tell):
                rows.append(row)
        except KeyboardInterrupt:
            say("interrupted: what is measured is kept")
    if rows:
        tables.show(console, f"Convolutions of training steps on {name}", HEADER, [cells(row) for row in rows])
    return rows, entries(rows, source(name))


def main(request: Request, out: Any, write: bool, console: Console, device: Device | None = None) -> int:
    """What the command does; returns the exit status. Tests give a device.

    1 without a CUDA device, where the table cannot be written, which is found before anything is measured, or where
    nothing was measured.
    """
    from bench.gpu.timing import CudaDevice, why_no_device
    from parnet_kernels.files import write_whole
    from parnet_kernels.triton import policy

    def refuse(text: str) -> int:
        console.print(f"bench convolutions {text}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 1

    if device is None:
        if reason := why_no_device():
            return refuse(reason)
        device = CudaDevice()
    on_gpu, model = device.torch_device.type == "cuda", policy.model(device.torch_device)
    name = torch.cuda.get_device_name(device.torch_device) if on_gpu else model
    if write and (reason := table.why_not_write(model)):
        return refuse(f"cannot write: {reason}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return refuse(f"cannot write to the folder {out}: {error}")
    _, found = run(request, device, name, console)
    if not found:
        return refuse("measured nothing")
    copy = out / table.table_path(model).name
    try:
        write_whole(copy, table.text(model, found).encode())
        paths = [copy, table.write(model, found)] if write else [copy]
    except (OSError, ValueError) as error:  # a disk that has filled up meanwhile
        return refuse(str(error))
    for path in paths:
        console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    return 0
