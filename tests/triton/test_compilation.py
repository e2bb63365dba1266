"""Compilation side by side: of exactly what a step launches; progress, errors, interrupts. The compiler's own work, for
sm_80, with a driver that knows no GPU.
"""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime import _async_compile
from triton.runtime.driver import driver

from parnet_kernels import training_ops
from parnet_kernels.config import ParNetConfig
from parnet_kernels.model import Block, ParNet
from parnet_kernels.ops import use_backend
from parnet_kernels.train.learner import Learner
from parnet_kernels.train.ranks import Ranks
from parnet_kernels.train.settings import settings
from parnet_kernels.triton import (
    backend,
    compilation,
    conv_bwd,
    conv_fwd,
    launch,
    train_bwd,
    train_fusion,
    train_fwd,
    train_gate_bwd,
    tuning,
)
from parnet_kernels.triton.launch import Launch

NO_DEVICE = 4711  # kernels compiled for it are no device's
KERNELS = [
    value
    for module in (train_fwd, train_bwd, train_gate_bwd, train_fusion)
    for name, value in vars(module).items()
    if name.startswith("train_") and name.endswith("_kernel")
]


class NoGpu:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self) -> int:
        return NO_DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Kernels take CPU tensors, are compiled for sm_80 and kept nowhere."""
    if launch.INTERPRETED:
        pytest.skip("nothing is compiled under the interpreter")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setitem(training_ops.KERNELS, "triton", lambda x: None)
    monkeypatch.setattr(driver, "_active", NoGpu())
    with use_backend("triton"):
        yield
    for kernel in KERNELS:
        kernel.device_caches.pop(NO_DEVICE, None)


def compiled() -> dict[str, Any]:
    """What Triton's caches hold: by hash, the name of the kernel."""
    found = {}
    for kernel in KERNELS:
        for one in kernel.device_caches.get(NO_DEVICE, ({},))[0].values():
            assert not isinstance(one, _async_compile.FutureKernel)
            found[one.hash] = kernel.__name__
    return found


def launched(model: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> set[str]:
    """Makes a step; the hash of each kernel that it launches. A kernel that is not compiled raises."""
    found: set[str] = set()

    def run(kernel: Any, grid: Any, arguments: dict[str, Any], options: dict[str, int]) -> None:
        with launch._without_compiling():
            found.add(kernel.warmup(grid=grid, **arguments, **options).hash)

    with mock.patch.object(launch, "run", run):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            y = model(x)
        y.float().square().sum().backward()
    return found


def block() -> tuple[nn.Module, Tensor]:
    return Block(20, 20, 1, 1, "silu"), torch.randn(2, 20, 6, 5, requires_grad=True)


def test_exactly_what_a_step_launches() -> None:
    model, x = block()
    told: list[tuple[int, int]] = []
    with pytest.raises(RuntimeError, match="is not compiled"):
        launched(model, x)
    count = tuning.compile_step(model, x, told=lambda *numbers: told.append(numbers))
    assert told == [(i + 1, count) for i in range(count)]
    assert sorted(compiled().values()) == sorted(k.__name__ for k in KERNELS if k.__name__ not in vars(train_fusion))
    assert launched(model, x) == set(compiled())
    assert tuning.compile_step(model, x, told=lambda *_: pytest.fail("nothing is left to do")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_exactly_what_a_step_of_a_network_launches(autocast: torch.dtype | None) -> None:
    model, x = ParNet(ParNetConfig((6, 16, 12, 24), (2, 2, 2), num_classes=3)), torch.randn(3, 3, 32, 32)
    count = tuning.compile_step(model, x, autocast=autocast, told=lambda *_: None)
    assert set(compiled().values()) == {kernel.__name__ for kernel in KERNELS}
    assert launched(model, x, autocast) == set(compiled())
    assert count == len(compiled())


@pytest.mark.slow
def test_the_convolutions_that_are_measured() -> None:
    """All of ours are compiled before the first is timed."""
    from bench.gpu import convolutions as bench
    from parnet_kernels.triton.convolutions import ROLES

    kernels = (conv_fwd.conv_se_fwd_kernel, conv_bwd.weight_se_bwd_kernel)
    every = [(bench.Shape((2, 16, 7, 6), 32, 2), role, "fp16") for role in ROLES]
    try:
        assert bench.compile_all(every, torch.device("cpu")) >= 3
        assert all(kernel.device_caches[NO_DEVICE][0] for kernel in kernels)
        assert bench.compile_all(every, torch.device("cpu")) == 0
    finally:
        for kernel in kernels:
            kernel.device_caches.pop(NO_DEVICE, None)


def test_nothing_else_changes() -> None:
    """Neither buffers nor gradients nor random numbers; and dropout does not draw."""
    model, x = block()
    model = nn.Sequential(model, nn.Dropout())
    model[0].rbr_dense.bn.weight.grad = torch.ones(20)  # type: ignore[union-attr]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    with mock.patch.object(compilation.Compilation, "take"):
        assert tuning.compile_step(model, x, told=print) == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [p.grad is None for p in model.parameters()].count(False) == 1
    assert torch.equal(model[0].rbr_dense.bn.weight.grad, torch.ones(20))  # type: ignore[union-attr, arg-type]
    assert torch.autograd.is_multithreading_enabled()
    assert not list(launch.recorded().__enter__())


def test_a_network_in_eval_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass of a deployed one."""
    monkeypatch.setattr(backend, "why_not", lambda op, x: None)
    taken: list[str] = []
    monkeypatch.setattr(compilation.Compilation, "take", lambda self, one: taken.append(one.kernel.__name__))
    deployed = ParNet(ParNetConfig((6, 8, 12, 16), (2, 2, 2), num_classes=3)).eval().deploy()
    assert tuning.compile_step(deployed, torch.randn(1, 3, 32, 32), told=print) == 0
    assert {"conv_se_fwd_kernel", "gate_se_fwd_kernel"} <= set(taken)
    assert not any("bwd" in name for name in taken)


# ------------------------------------------------------------------ errors and interrupts


def test_a_model_of_several_results() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(TypeError, match="`model` must return a tensor, got a tuple"):
        tuning.compile_step(Two(), torch.randn(1, 2, 3, 3))


@triton.jit
def wrong_while_compiling_kernel(x_ptr):  # type: ignore[no-untyped-def]
    tl.static_assert(False, "never right")
    tl.store(x_ptr, 0.0)


@triton.jit
def wrong_to_begin_with_kernel(x_ptr, MORE: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x_ptr, MORE)


@triton.jit
def right_kernel(x_ptr, VALUE: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x_ptr, VALUE)


WRONG = {
    "wrong_while_compiling_kernel": (wrong_while_compiling_kernel, {}),
    "wrong_to_begin_with_kernel": (wrong_to_begin_with_kernel, {"LESS": 1}),
}


def right(value: float) -> Launch:
    return Launch(right_kernel, (1,), {"x_ptr": torch.zeros(4), "VALUE": value}, {"num_warps": 1})


@pytest.fixture
def own_kernels() -> Iterator[None]:
    yield
    for kernel in (right_kernel, *(kernel for kernel, _ in WRONG.values())):
        kernel.device_caches.clear()


def kept() -> int:
    """How many of `right_kernel` are compiled; none of them is a promise."""
    found = right_kernel.device_caches[NO_DEVICE][0].values()
    assert not any(isinstance(one, _async_compile.FutureKernel) for one in found)
    return len(found)


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize("name", WRONG)
def test_an_error_names_its_kernel(name: str) -> None:
    kernel, more = WRONG[name]
    wrong = Launch(kernel, (1,), {"x_ptr": torch.zeros(4), **more}, {"num_warps": 1})
    for _ in range(2):  # an error leaves nothing behind
        with pytest.raises(RuntimeError, match=f"^parnet_kernels: {name} cannot be compiled: "):
            compilation.together([wrong, right(1.0)])
        assert _async_compile.active_mode.get() is None
        assert not [one for caches in kernel.device_caches.values() for one in caches[0].values()]
    compilation.together([right(1.0)])
    assert kept() == 1
    assert compilation.together([right(1.0), right(2.0), right(2.0)]) == 1
    assert kept() == 2


def failing_parser(monkeypatch: pytest.MonkeyPatch, times: int) -> list[str]:
    """As Python 3.11's, which threads disturb; returns the threads in which it fails."""
    failed: list[str] = []
    parse = triton.JITFunction.parse

    def fails(self: Any) -> Any:
        if threading.current_thread() is not threading.main_thread() and len(failed) < times:
            failed.append(threading.current_thread().name)
            raise SystemError("AST constructor recursion depth mismatch (before=177, after=253)")
        return parse(self)

    monkeypatch.setattr(triton.JITFunction, "parse", fails)
    return failed


@pytest.mark.usefixtures("own_kernels")
def test_the_parser_fails_for_another_threads_sake(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = failing_parser(monkeypatch, 3)
    assert compilation.together(map(right, range(2))) == 2
    assert kept() == 2
    assert [name.startswith("parnet-compile") for name in failed] == [True] * 3


@pytest.mark.usefixtures("own_kernels")
def test_the_parser_fails_always(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = failing_parser(monkeypatch, 1000)
    with pytest.raises(RuntimeError, match=r"^parnet_kernels: right_kernel cannot be compiled: .*mismatch"):
        compilation.together([right(1.0)])
    assert len(failed) == 10


@pytest.mark.usefixtures("own_kernels")
def test_nothing_is_compiled_while_launches_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton parses there too, for its cache key."""
    begun: list[str] = []
    monkeypatch.setattr(compilation, "_despite_the_parser", lambda compile: (begun.append("one"), compile())[1])
    with compilation.compiling() as taking:
        for value in range(3):
            launch.run(*right(value))
            time.sleep(0.05)
        assert len(taking.names) == 3
        assert not begun
    assert len(begun) == 3


@pytest.mark.usefixtures("own_kernels")
def test_an_interrupt_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many kernels no other one begins; the same ones can be compiled afterwards."""
    monkeypatch.setattr(compilation, "cores", lambda: 1)

    def interrupts(done: int, total: int) -> None:
        assert (done, total) == (1, 8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compilation.together(map(right, range(8)), interrupts)
    assert 1 <= kept() <= 3  # that one, and what had begun meanwhile
    assert _async_compile.active_mode.get() is None
    left = 8 - kept()
    assert compilation.together(map(right, range(8))) == left
    assert kept() == 8


@pytest.mark.usefixtures("own_kernels")
def test_an_interrupt_while_launches_are_taken() -> None:
    def host() -> Iterator[Launch]:
        yield right(1.0)
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        compilation.together(host())
    assert kept() == 0
    with launch.recorded() as found:
        launch.run(*right(1.0))
    assert len(found) == 1


def test_not_during_a_capture() -> None:
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
        pytest.raises(RuntimeError, match="compile_step must run before a CUDA graph capture"),
    ):
        tuning.compile_step(*block())


# ------------------------------------------------------------------ what a user sees


SHOWS = """
from parnet_kernels.triton import tuning
with tuning._shown() as tell:
    for i in range(4):
        tell(i, 3)
print("result")
"""


def test_a_line_on_a_terminal() -> None:
    """Not on standard output, and nothing in a pipe."""
    command = [sys.executable, "-c", SHOWS]
    piped = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (piped.stdout, piped.stderr.strip()) == ("result\n", "")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    shown = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=300, env=environment)
    os.close(theirs)
    text = os.read(ours, 100_000).decode()
    os.close(ours)
    assert shown.stdout == "result\n"
    assert "compiling Triton kernels" in text
    assert "3/3" in text


@pytest.mark.parametrize("amp", [False, True])
def test_parnet_train_compiles_before_it_steps(amp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    network = ParNet(ParNetConfig((6, 8), (2,), num_classes=3))
    chosen = settings({"data": "x", "batch": 16, "accumulate": 2, "size": 24, "amp": amp})
    learner = Learner(network, chosen, Ranks(0, 1, torch.device("cpu")))
    seen: list[Any] = []

    def noted(model: nn.Module, x: Tensor, autocast: Any, told: Any) -> int:
        seen.append((model is learner.model, tuple(x.shape), autocast, told))
        return 7

    monkeypatch.setattr(tuning, "compile_step", noted)
    assert learner.compile_kernels() == 7
    assert seen == [(True, (8, 3, 24, 24), torch.bfloat16 if amp else None, None)]
    with use_backend("reference"):
        assert learner.compile_kernels() == 0
    monkeypatch.setitem(training_ops.KERNELS, "triton", lambda x: "needs a CUDA device")
    assert learner.compile_kernels() == 0
    assert len(seen) == 1
