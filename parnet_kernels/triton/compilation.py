"""Compiles what would be launched, side by side: Triton's passes and assemblers run without Python's lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import _async_compile

from parnet_kernels.triton import launch
from parnet_kernels.triton.launch import Launch

Told = Callable[[int, int], object]  # kernels that are compiled, kernels that are to be


class Compilation:
    """The executor of Triton's AsyncCompileMode. It knows which kernel each compilation is of."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool, self._current = pool, ""
        self.names: dict[Future[Any], str] = {}
        self.kernels: dict[str, Any] = {}

    def submit(self, compile: Callable[[], Any]) -> Future[Any]:
        future = self._pool.submit(_despite_the_parser, compile)
        self.names[future] = self._current
        return future

    def take(self, one: Launch) -> None:
        """It is to be compiled, unless it is. Keeps no tensor."""
        name = self._current = one.kernel.__name__
        self.kernels[name] = one.kernel
        tensor = next(v for v in one.arguments.values() if isinstance(v, Tensor))
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            try:
                one.kernel.warmup(grid=one.grid, **one.arguments, **one.options)
            except Exception as error:
                raise _failure(name, error) from error

    def wait(self, told: Told | None) -> None:
        for done, future in enumerate(as_completed(self.names), 1):
            if error := future.exception():
                raise _failure(self.names[future], error) from error
            if told is not None:
                told(done, len(self.names))

    def forget(self) -> None:
        """Takes what was not compiled out of Triton's caches: since 3.7 they hold promises, which a launch would wait
        for.
        """
        for kernel in self.kernels.values():
            for cache, *_ in getattr(kernel, "device_caches", {}).values():
                for key, found in [*cache.items()]:
                    if isinstance(found, _async_compile.FutureKernel) and found.kernel is None:
                        del cache[key]


def _despite_the_parser(compile: Callable[[], Any]) -> Any:
    """Compiles again where Python 3.11's parser, whose depth counter all threads share, failed for another thread's
    sake (python/cpython#106905).
    """
    for _ in range(9):
        try:
            return compile()
        except Exception as error:
            if not _parser_failed(error):
                raise
    return compile()


def _parser_failed(error: BaseException | None) -> bool:
    """Triton wraps the parser's errors several times."""
    while error is not None:
        if isinstance(error, SystemError) and "recursion depth mismatch" in str(error):
            return True
        error = error.__cause__
    return False


def _failure(name: str, error: BaseException) -> RuntimeError:
    return RuntimeError(f"parnet_kernels: {name} cannot be compiled: {type(error).__name__}: {error}")


def cores() -> int:
    """That this process may use."""
    return (os.process_cpu_count() if hasattr(os, "process_cpu_count") else len(os.sched_getaffinity(0))) or 1


@contextmanager
def compiling(told: Told | None = None) -> Iterator[Compilation]:
    """Within the block this thread's launches are taken, and nothing runs. At its end all of them are compiled, as they
    would be by the first launch; whatever interrupts it, no other one begins.

    Raises:
        RuntimeError: a kernel cannot be compiled; names it.
    """
    # No compilation begins before the last launch is taken: Triton parses a kernel to make its cache key, and where
    # another thread's parsing makes that fail (see `_despite_the_parser`), a key without its source is left behind.
    taken = threading.Event()
    pool = ThreadPoolExecutor(cores(), "parnet-compile", initializer=taken.wait)
    compilation = Compilation(pool)
    if launch.INTERPRETED:
        with launch.given_to(lambda _: None):
            yield compilation
        return
    before = _async_compile.active_mode.get()
    try:
        # Errors are told by `wait`. The mode waits for compilations that have begun, which nothing can stop.
        with triton.AsyncCompileMode(compilation, ignore_errors=True):
            try:
                with launch.given_to(compilation.take):
                    yield compilation
                taken.set()
                compilation.wait(told)
            except BaseException:
                for future in compilation.names:
                    future.cancel()
                raise
            finally:
                taken.set()
    finally:
        _async_compile.active_mode.set(before)  # the mode does not where it was interrupted
        compilation.forget()
        pool.shutdown(wait=False, cancel_futures=True)


def together(launches: Iterable[Launch], told: Told | None = None) -> int:
    """Compiles what has not been compiled for these arguments. Returns how many kernels that were."""
    with compiling(told) as compilation:
        for kernel, grid, arguments, options in launches:
            launch.run(kernel, grid, arguments, options)
    return len(compilation.names)
