"""The measured table of convolutions: how it is measured, written, read and refused, by a clock that tests drive."""

from __future__ import annotations

import itertools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fake_device import TINY, FakeDevice
from rich.console import Console
from test_training_counts import step
from torch import Tensor

from bench.gpu import convolutions as bench
from bench.gpu.convolutions import Request, Shape, Timed
from parnet_kernels.model import ParNet
from parnet_kernels.triton import convolution_table as table
from parnet_kernels.triton import convolutions, policy
from parnet_kernels.triton.convolutions import FORWARD, OF_INPUT, OF_WEIGHT, ROLES

MODEL = policy.model(torch.device("cpu"))
X, WEIGHT = torch.randn(2, 8, 5, 5), torch.randn(8, 8, 3, 3)


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where the table of this machine lies: nothing is there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    table.measured.cache_clear()
    yield table.table_path(MODEL)
    table.measured.cache_clear()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.VARIANTS, "tiny", TINY)


def entry(which: str = "own", **more: Any) -> dict[str, Any]:
    return {"which": which, "source": "a test", **more}


# ------------------------------------------------------------------ the file


def test_what_is_written_decides(path: Path) -> None:
    assert convolutions.choose(FORWARD, X, WEIGHT, 1, 1).why == "by arithmetic, at the batches of training"
    assert table.write(MODEL, {convolutions.key(FORWARD, X, WEIGHT, 1): entry()}) == path
    others = {OF_INPUT: entry(), OF_WEIGHT: entry("library")}
    table.write(MODEL, {convolutions.key(role, X, WEIGHT, 1): e for role, e in others.items()})
    told = "measured on this model of GPU"
    found = [convolutions.choose(role, X, WEIGHT, 1, 1) for role in ROLES]
    assert found == [("own", told), ("own", told), ("library", told)]
    assert convolutions.choose(FORWARD, X, WEIGHT, 2, 1).which == "library"  # another stride was not measured
    assert convolutions.choose(FORWARD, X.half(), WEIGHT.half(), 1, 1).which == "library"
    assert convolutions.choose(FORWARD, X, torch.randn(8, 8, 1, 1), 1, 1).why == "ours are 3×3 in one group"
    with convolutions.forced("library"):
        assert convolutions.choose(FORWARD, X, WEIGHT, 1, 1) == ("library", "asked for")
    neighbour = torch.randn(2, 8, 5, 4)  # 40 pixels, as 50 between 32 and 64
    assert convolutions.choose(FORWARD, neighbour, WEIGHT, 1, 1).which == "own"
    assert not [p for p in path.parent.iterdir() if p != path]
    assert table.told(MODEL) == f"2 of 3 measured ones are ours: {path}, from a test"


def test_products_of_float32_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with bench.products_in("tf32"):
        one = convolutions.key(FORWARD, X, WEIGHT, 1)
    with bench.products_in("fp32"):
        other = convolutions.key(FORWARD, X, WEIGHT, 1)
    assert one == "forward/float32 tf32/6/8x8/1"
    assert other == "forward/float32 ieee/6/8x8/1"


NO_TABLE = "it is no table"
DAMAGED = {
    "{": "Expecting property name",
    "": "Expecting value",
    "[]": NO_TABLE,
    "null": NO_TABLE,
    "[" * 100_000: "nested too deeply",
    '{"forward/float32/6/8x8/1": "own"}': NO_TABLE,
    '{"model": "interpreter", "entries": ["own"]}': NO_TABLE,
    '{"model": "interpreter", "entries": {"a": "own"}}': NO_TABLE,
    '{"model": "interpreter", "entries": {"a": {}}}': "must be 'library' or 'own', got 'None'",
    '{"model": "interpreter", "entries": {"a": {"which": ["own"]}}}': "must be 'library' or 'own'",
    '{"model": "nvidia-h200", "entries": {}}': "measured on 'nvidia-h200', this is 'interpreter'",
    '{"model": "a\\u001b[2J", "entries": {}}': r"measured on 'a\x1b[2J'",
    '{"entries": {}}': "measured on None",
}


@pytest.mark.parametrize("text", DAMAGED, ids=lambda text: text[:40])
def test_what_is_no_table_of_this_device(text: str, path: Path) -> None:
    """Ignored with one warning, told by `parnet info`, and never overwritten."""
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(UserWarning, match=re.escape(f"ignoring the table {path}: ")) as seen:
        found = [convolutions.choose(FORWARD, X, WEIGHT, 1, 1).which for _ in range(2)]
    assert found == ["library", "library"]
    assert len(seen) == 1
    assert DAMAGED[text] in str(seen[0].message)
    assert f"ignoring {path}: " in table.told(MODEL)
    assert DAMAGED[text] in table.told(MODEL)
    assert DAMAGED[text] in str(table.why_not_write(MODEL))
    with pytest.raises(ValueError, match=re.escape(DAMAGED[text])):
        table.write(MODEL, {"a": entry()})
    assert path.read_text() == text


def test_bytes_that_are_no_text(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xff\xfe{")
    with pytest.warns(UserWarning, match="ignoring the table"):
        assert table.measured(MODEL) == {}


def test_a_place_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder that is a file; then a table that is a folder."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "Not a directory" in str(table.why_not_write(MODEL))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    table.table_path(MODEL).mkdir(parents=True)
    assert "Is a directory" in str(table.why_not_write(MODEL))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "right"))
    assert table.why_not_write(MODEL) is None
    assert [*table.table_path(MODEL).parent.iterdir()] == []


def test_parnet_info(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    from parnet_kernels.app import cli

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli._convolutions() == "no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: ["NVIDIA H200", "NVIDIA L4"][d.index])
    policy.model.cache_clear()
    here = table.write("nvidia-h200", {"a": entry()})
    here.rename(table.table_path("nvidia-l4"))  # copied from another machine
    table.write("nvidia-h200", {"a": entry(), "b": entry("library", source="an older test")})
    found = cli._convolutions()
    policy.model.cache_clear()
    assert found["cuda:0"] == f"1 of 2 measured ones are ours: {here}, from an older test and 1 more"  # type: ignore[index]
    assert "measured on 'nvidia-h200', this is 'nvidia-l4'" in found["cuda:1"]  # type: ignore[index]
    assert "not measured (python -m bench convolutions --write)" in table.told("nvidia-a100")


# ------------------------------------------------------------------ what is measured


def test_the_convolutions_of_a_step(tiny: None) -> None:
    """Those that a training step asks the policy for: no more, no less."""
    asked: set[str] = set()
    choose = convolutions.choose

    def noted(role: str, x: Tensor, weight: Tensor, stride: int, groups: int) -> Any:
        if weight.shape[2] == 3 and groups == 1:
            asked.add(convolutions.key(role, x, weight, stride))
        return choose(role, x, weight, stride, groups)

    with mock.patch.object(convolutions, "choose", noted):
        model = ParNet(TINY)
        step(lambda: model(torch.randn(2, 3, 64, 64)))
    found = [bench.calls_of(shape, role, "fp32", X.device)[0] for shape, role in bench.products("tiny", 2, 64)]
    assert len(found) == len(set(found)) == 23
    assert set(found) == asked


# ------------------------------------------------------------------ measuring


class Clock(FakeDevice):
    """Ours and the library's take what `cost` says of the role and of which it is; both make the library's results."""

    def __init__(
        self, cost: Callable[[str, str], float], change: Callable[[str, Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.cost, self.change = cost, change or (lambda which, y: y)
        self.forward, self.gradients = convolutions.forward, convolutions.gradients

    def _made(self, role: str, y: Tensor) -> Tensor:
        which = convolutions._forced
        assert which is not None
        self.work(f"{which} {role}", self.cost(role, which))
        return self.change(which, y)

    def do_forward(self, *arguments: Any) -> Tensor:
        which = convolutions._forced
        with convolutions.forced("library"):
            y = self.forward(*arguments)
        assert which == convolutions._forced
        return self._made(FORWARD, y)

    def do_gradients(self, *arguments: Any) -> tuple[Tensor | None, ...]:
        role = OF_INPUT if arguments[-2] else OF_WEIGHT
        with convolutions.forced("library"):
            found = self.gradients(*arguments)
        return tuple(None if t is None else self._made(role, t) for t in found)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[Clock], Clock]:
    def use(clock: Clock) -> Clock:
        monkeypatch.setattr(bench, "SAMPLES", 2)
        monkeypatch.setattr(convolutions, "forward", clock.do_forward)
        monkeypatch.setattr(convolutions, "gradients", clock.do_gradients)
        return clock

    return use


def costs(own: dict[str, float]) -> Callable[[str, str], float]:
    """The library takes 2 ms."""
    return lambda role, which: own[role] if which == "own" else 2.0


SHAPE = Shape((2, 3, 9, 7), 5, 2)
REQUEST = Request(["tiny"], [2], 16, ["fp32"], 1, 10.0)


@pytest.mark.parametrize(("own", "which"), [(1.0, "own"), (1.93, "own"), (1.95, "library"), (5.0, "library")])
def test_the_faster_one_by_a_margin(own: float, which: str, on: Any) -> None:
    clock = on(Clock(costs(dict.fromkeys(ROLES, own))))
    for role in ROLES:
        row = bench.time_one(SHAPE, role, "fp16", clock, 2)
        assert (row.reason, row.difference, row.which) == ("", 0.0, which)
        assert row.milliseconds == pytest.approx({"library": 2.0, "own": own})
        assert {name.split(" ", 1)[1] for name in clock.log} == {role}
        clock.log.clear()


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "tf32", "fp32"])
def test_no_time_where_results_differ(dtype: str, on: Any) -> None:
    bound = bench.PEER_TOLERANCE[dtype][0]
    for off, differ in ((0.5 * bound, False), (2 * bound, True), (math.nan, True)):
        scale = {"own": 1 + off, "library": 1.0}
        clock = on(Clock(costs(dict.fromkeys(ROLES, 1.0)), lambda which, y, by=scale: y.double() * by[which]))
        row = bench.time_one(SHAPE, OF_WEIGHT, dtype, clock, 1)
        assert bool(row.reason) == (not row.milliseconds) == differ
        assert bench.cells(row)[-1] == ("own" if not differ else row.reason)
        assert bool(bench.entries([row], "a test")) != differ
        if differ:
            assert row.reason.startswith("they differ: ")


def test_a_failure_costs_one(tiny: None, on: Any) -> None:
    clock = on(Clock(costs(dict.fromkeys(ROLES, 1.0))))
    work = clock.work

    def fails(name: str, milliseconds: float) -> None:
        if name == "own input gradient":
            raise RuntimeError("out of memory\nand more")
        work(name, milliseconds)

    clock.work = fails  # type: ignore[method-assign]
    rows = list(bench.measure(REQUEST, clock, print, lambda *_: None))
    assert {row.reason for row in rows if row.role == OF_INPUT} == {"RuntimeError: out of memory"}
    assert not any(row.reason for row in rows if row.role != OF_INPUT)
    assert len(rows) == 23


def console() -> Console:
    return Console(width=200, color_system=None)


def test_from_the_measurement_to_the_decision(tiny: None, on: Any, tmp_path: Path, path: Path, capsys: Any) -> None:
    clock = on(Clock(costs({FORWARD: 1.0, OF_INPUT: 3.0, OF_WEIGHT: 1.5})))
    out = tmp_path / "out"
    request = replace(REQUEST, dtypes=["fp16", "fp32"])
    assert bench.main(request, out, False, console(), clock) == 0
    assert not path.exists()
    assert json.loads((out / path.name).read_text())["model"] == MODEL
    table.write(MODEL, {"measured before": entry("library")})
    assert bench.main(request, out, True, console(), clock) == 0
    printed = capsys.readouterr().out
    assert f"wrote {path}" in printed
    assert "forward 2x3x16x16 to 8 /2 fp16\t2.000\t1.000\t2.00\t0e+00\town" in printed
    found = table.read(MODEL)
    assert found.pop("measured before")["which"] == "library"
    copy = json.loads((out / path.name).read_text())["entries"]
    assert found == copy
    for word in ("interpreter", "torch ", "triton ", "cuDNN", "benchmark False", "deterministic False", "warm"):
        assert word in next(iter(found.values()))["source"]
    x, weight = torch.randn(2, 8, 4, 4).half(), torch.randn(8, 8, 3, 3).half()
    decided = [convolutions.choose(role, x, weight, 1, 1) for role in ROLES]
    assert [d.which for d in decided] == ["own", "library", "own"]
    assert {d.why for d in decided} == {"measured on this model of GPU"}
    with bench.products_in("fp32"):
        assert convolutions.choose(FORWARD, x.float(), weight.float(), 1, 1).which == "own"
    assert convolutions.choose(FORWARD, x.bfloat16(), weight.bfloat16(), 1, 1).which == "library"  # not asked for


def test_the_largest_of_one_key_counts() -> None:
    small, large = (Timed(Shape((n, 8, 8, 8), 8, 1), FORWARD, "fp16", "key", 0.0, {"library": t, "own": o})
                    for n, t, o in ((2, 1.0, 2.0), (3, 2.0, 1.0)))  # fmt: skip
    for rows in ([small, large], [large, small]):
        assert bench.entries(rows, "a test")["key"]["which"] == "own"


def test_what_cannot_be_written_is_refused_before_it_is_measured(
    tiny: None, on: Any, tmp_path: Path, path: Path, capsys: Any
) -> None:
    clock = on(Clock(costs(dict.fromkeys(ROLES, 1.0))))
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert bench.main(REQUEST, tmp_path / "out", True, console(), clock) == 1
    assert "is there and cannot be added to: Expecting property name" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    assert bench.main(REQUEST, tmp_path / "file" / "out", False, console(), clock) == 1
    assert "cannot write to the folder" in capsys.readouterr().out
    assert clock.log == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert bench.main(REQUEST, tmp_path / "out", False, console(), clock) == 0  # it reads no table


def test_a_disk_that_fills_up(
    tiny: None, on: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    """The table on the screen is what is left."""
    clock = on(Clock(costs(dict.fromkeys(ROLES, 1.0))))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(table, "write", full)
    assert bench.main(REQUEST, tmp_path, True, console(), clock) == 1
    told = capsys.readouterr().out
    assert "bench convolutions [Errno 28] No space left on device" in told
    assert told.count("\town") == 23


def test_minutes_keep_what_is_measured(
    tiny: None, on: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    clock = on(Clock(costs(dict.fromkeys(ROLES, 1.0))))
    now = itertools.count(0, 60)
    monkeypatch.setattr(bench, "monotonic", lambda: next(now))
    assert bench.main(replace(REQUEST, minutes=2.5), tmp_path, False, console(), clock) == 0
    told = capsys.readouterr().out
    assert re.search(r"2\.5 minutes are over: \d+ left out", told)
    assert told.count("\town") == 2


def test_an_interrupt_keeps_what_is_measured(
    tiny: None, on: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    clock = on(Clock(costs(dict.fromkeys(ROLES, 1.0))))
    real, count = bench.time_one, itertools.count()

    def interrupts(*arguments: Any) -> Any:
        if next(count) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(bench, "time_one", interrupts)
    assert bench.main(REQUEST, tmp_path, False, console(), clock) == 0
    told = capsys.readouterr().out
    assert "interrupted: what is measured is kept" in told
    assert told.count("\town") == 2


def test_the_command_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from bench.__main__ import app

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = CliRunner().invoke(app, ["convolutions", "--write", "--out", str(tmp_path / "out")])
    assert told.exit_code == 1
    assert "bench convolutions needs a CUDA device" in told.output
    assert not (tmp_path / "out").exists()
    for arguments in (
        ["--dtypes", "fp8"],
        ["--variants", "s,q"],
        ["--batch", "0"],
        ["--batch", "x"],
        ["--rounds", "0"],
    ):
        assert CliRunner().invoke(app, ["convolutions", *arguments]).exit_code == 2
