"""Runs the backend's host code on CPU tensors, every launch compiled and executed by the PTX simulator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar
from unittest import mock

from torch import Tensor

from parnet_kernels.triton import launch, policy
from tests.ptxsim import PtxModule, Result
from tests.triton.offline import Launch

T = TypeVar("T")


@functools.cache
def _module(ptx: str) -> PtxModule:
    return PtxModule(ptx)


def run_in_simulator(one: Launch, target: str = "sm_80", **options: Any) -> Result:
    """One launch; raises on any report of the simulator's checks."""
    compiled = one.compile(target)
    names = one.source()[1]
    module = _module(compiled.asm["ptx"])
    kernel = compiled.metadata.name
    scratch = len(module.module.functions[kernel].params) - len(names)  # Triton appends pointers that are not used here
    values = [one.arguments[name] for name in names]
    return module.launch(
        kernel,
        grid=one.grid,
        block=one.options["num_warps"] * 32,
        args=[v.detach() if isinstance(v, Tensor) else v for v in values] + [None] * scratch,
        shared_bytes=compiled.metadata.shared,
        **options,
    )


def simulate(host: Callable[[], T], target: str = "sm_80", **options: Any) -> tuple[T, dict[str, Result]]:
    """(what `host` returns, the counters of each kernel's last launch by name). target: what tiles are for, too."""
    results: dict[str, Result] = {}

    def run(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], compile_options: dict[str, int]) -> None:
        result = run_in_simulator(Launch(kernel, grid, arguments, compile_options), target, **options)
        results[f"{kernel.__name__}:{arguments['STAGE']}" if "STAGE" in arguments else kernel.__name__] = result

    with mock.patch.object(launch, "run", run), mock.patch.object(policy, "architecture", return_value=target):
        return host(), results
