"""One process, or those that torchrun started: which this one is, sums over all of them, what happens when one dies."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from parnet_kernels.app.sources import Share

#: How long the others wait for a process that lives and does not answer. One that dies is noticed at once.
TIMEOUT = timedelta(minutes=30)
_LOST = re.compile(r"gloo|nccl|connection|socket|broken pipe|timed? ?out|process ?group|peer", re.IGNORECASE)


class LostRank(ConnectionError):
    """Another process of the run is gone."""


class Ranks(NamedTuple):
    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def sums(self, *values: float) -> list[float]:
        """Over all processes, in float64."""
        if self.world == 1:
            return [*values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def wait(self, problem: str = "") -> None:
        """For all processes, after what the first one alone does.

        Raises:
            ValueError: it had a `problem`.
        """
        if self.world == 1:
            if problem:
                raise ValueError(problem)
            return
        told = [problem]
        dist.broadcast_object_list(told, 0, device=self.device)
        if told[0]:
            raise ValueError(told[0])


def restarts() -> int:
    """How often torchrun has started the processes again, after one died."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return int(count) if count.isascii() and count.isdigit() else 0


def _device(asked: str, share: Share) -> torch.device:
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("`device` is cuda, and PyTorch finds none")
    local = os.environ.get("LOCAL_RANK", "0")
    index = int(local) if local.isascii() and local.isdigit() else 0
    if index >= torch.cuda.device_count():
        raise ValueError(f"process {share.rank} needs cuda:{index}: one device a process; device=cpu shares the CPU")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The processes of this run, as the environment says.

    Raises:
        LostRank: from what stands inside, when another process died.
        ValueError: a device is missing.
    """
    share = Share.of_environment()
    here = _device(device, share)
    if share.world == 1:
        yield Ranks(0, 1, here)
        return
    _leave_when_told(share.rank)
    # torchrun keeps its store when it starts processes again: the addresses of those that are gone must not be found.
    store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store = dist.PrefixStore(f"start {restarts()}", store)
    backend = "nccl" if here.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        yield Ranks(share.rank, share.world, here)
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        raise LostRank(
            f"process {share.rank}: another process of the run is gone, so this one ends; --resume goes on from the "
            f"last checkpoint ({str(error).splitlines()[0]})"
        ) from error
    # No shutdown here: where an error ends this process, others may wait for it in a call, and see that it is gone.
    dist.destroy_process_group()


def _leave_when_told(rank: int) -> None:
    """torchrun ends the others by SIGTERM when one has died: says so, even while this process waits in a call."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # inherited by threads from here on

    def wait() -> None:
        signal.sigwait({signal.SIGTERM})
        print(f"parnet: process {rank} was told to end (another one may be gone); --resume goes on from the last "
              "checkpoint", file=sys.stderr, flush=True)  # fmt: skip
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
