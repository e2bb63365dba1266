"""One engine in a process of its own, so that its thread pool cannot disturb another engine's.

The process answers calls over a pipe and is stopped by a signal between them: threads that spin cannot take the
processor from the engine being measured. What engines print goes to a log file.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 120


class WorkerError(RuntimeError):
    """What a worker raised, or how it ended."""


def serve(pipe: Connection, name: str, threads: int, folder: Path, log: Path) -> None:
    """The process: answers (method, arguments) by ("ok", value) or ("error", reason) until the pipe closes."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        from bench.worker import Worker  # after the redirection, and where an error can be reported

        worker = Worker(name, threads, folder)
        pipe.send(("ok", worker.version()))
    except Exception as error:
        pipe.send(("error", _reason(error)))
        return
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer: tuple[str, Any] = ("ok", getattr(worker, method)(*arguments))
        except Exception as error:
            traceback.print_exc()
            answer = ("error", _reason(error))
        sys.stdout.flush()
        pipe.send(answer)


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


class Handle:
    """The parent's side. Raises WorkerError where the worker did, or died, or took too long."""

    def __init__(self, name: str, threads: int, folder: Path) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        log = folder / f"{name}-{threads}.log"
        self.process = context.Process(target=serve, args=(theirs, name, threads, folder, log), daemon=True)
        # NumPy's threads would go on spinning after they have compared results, and disturb what is timed next.
        own = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
        before = dict(os.environ)
        os.environ.update(own)
        try:
            self.process.start()
        finally:
            for variable in own:
                if variable in before:
                    os.environ[variable] = before[variable]
                else:
                    del os.environ[variable]
        theirs.close()
        self.version: str = self._answer(START_TIMEOUT_S)
        self._signal(signal.SIGSTOP)

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def _signal(self, number: int) -> None:
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, number)

    def _answer(self, timeout: float) -> Any:
        try:
            if not self.pipe.poll(timeout):
                self.close(patience_s=0)
                raise WorkerError(f"no answer within {timeout:.0f} s")
            status, value = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(10)
            raise WorkerError(f"the process ended with code {self.process.exitcode}") from None
        if status == "error":
            raise WorkerError(value)
        return value

    def call(self, method: str, *arguments: object, timeout: float) -> Any:
        """Lets the worker run until it has answered."""
        self._signal(signal.SIGCONT)
        try:
            self.pipe.send((method, arguments))
            return self._answer(timeout)
        except BrokenPipeError:
            raise WorkerError(f"the process ended with code {self.process.exitcode}") from None
        finally:
            self._signal(signal.SIGSTOP)

    def close(self, patience_s: float = 5) -> None:
        """Lets the worker end by itself, which an idle one does at once; then ends it."""
        self._signal(signal.SIGCONT)
        with suppress(OSError):
            self.pipe.close()
        self.process.join(patience_s)
        self.process.terminate()
        self.process.join(10)
