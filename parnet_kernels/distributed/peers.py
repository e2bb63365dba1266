"""Messages between the ranks that run one network, and what becomes of ranks that do not answer.

Every rank is connected with rank 0 only, by a gloo group of the two; maps on a GPU travel by an NCCL group beside it.
Every wait ends: with the message, with an error about the rank that broke off or did not answer in time.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

MESSAGE_BYTES = 4096
BESIDE_BYTES = 16384  # of a verdict: small results travel in it
SLICE = 0.1  # seconds of one wait: between two, signals are seen
GRACE = 0.8  # rank 0 waits this share of the time-out, so that its verdict reaches ranks that wait in full


class DistributedError(RuntimeError):
    """What went wrong on which rank.

    Attributes:
        rank: where, counted within the group.
        reason: in words.
    """

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"parnet_kernels: rank {rank} {reason}")
        self.rank, self.reason = rank, reason

    def __reduce__(self) -> tuple[type[DistributedError], tuple[int, str]]:
        return DistributedError, (self.rank, self.reason)


class Broken(DistributedError):
    """A rank broke off or did not answer: the connections are of no use any more."""


class Posted:
    """A message under way. Holds the tensor that it is read from or written to."""

    def __init__(self, peers: Peers, work: Any, rank: int, tensor: Tensor, what: str) -> None:
        self._peers, self._work, self.rank, self._tensor, self.what = peers, work, rank, tensor, what

    def wait(self, deadline: float) -> Tensor:
        """Raises:
        Broken: the other rank broke off, or did not answer until `deadline` (of time.monotonic).
        """
        if self._tensor.is_cuda:  # NCCL's wait only orders streams: its end is asked for
            while not self._work.is_completed() and time.monotonic() < deadline:
                time.sleep(50e-6)
        while True:
            left = deadline - time.monotonic()
            try:
                self._work.wait(timedelta(seconds=min(SLICE, max(left, 1e-3))))
                return self._tensor
            except RuntimeError as error:
                if self._work.is_completed() and "timed out!" not in str(error):
                    raise self._peers.broken_off(self.rank, error) from error
                if left <= 0 and not self._work.is_completed():
                    raise self._peers.unanswered(self.rank, self.what) from error


class Peers:
    """The connections of this process. Made by all ranks at the same time.

    Args:
        group: of the ranks; None: all.
        timeout: seconds until a rank that does not answer is an error.
        hello: what all ranks must agree in, by name.
        device: of the maps.

    Raises:
        DistributedError: on every rank, for a rank that did not come in time, or says another hello.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, timeout: float, hello: dict[str, object], device: torch.device
    ) -> None:
        self.timeout = timeout
        self._ranks = dist.get_process_group_ranks(group) if group is not None else [*range(dist.get_world_size())]
        self.rank, self.world = self._ranks.index(dist.get_rank()), len(self._ranks)
        self._groups: dict[int, Any] = {}
        self._data: dict[int, Any] = {}
        self._who: list[dict[str, Any]] = []
        if self.world == 1:
            return
        store = self._meet(hello)
        self._connect(store, "nccl" if device.type == "cuda" and dist.get_backend(group) == "nccl" else "gloo")

    def _meet(self, hello: dict[str, object]) -> dist.Store:
        """Everyone says hello in the store that the process group was made with, and compares. Returns this meeting's
        part of the store.
        """
        store = c10d._get_default_store()
        prefix = "parnet/" + ".".join(map(str, self._ranks))
        meeting = store.add(f"{prefix}/{self.rank}", 1)  # every rank's n-th: the store may outlive a process
        own = {"pid": os.getpid(), "host": socket.gethostname(), "hello": hello}
        store.set(f"{prefix}/{meeting}/{self.rank}", json.dumps(own))
        deadline, pause = time.monotonic() + self.timeout, 1e-3
        for rank in range(self.world):
            while not store.check([f"{prefix}/{meeting}/{rank}"]):
                if time.monotonic() > deadline:
                    raise DistributedError(rank, f"did not make its StreamParallel within {self.timeout:g} s")
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
            self._who.append(json.loads(store.get(f"{prefix}/{meeting}/{rank}")))
        expected = self._who[0]["hello"]
        for rank, who in enumerate(self._who):
            for name in expected | who["hello"]:
                here, there = expected.get(name), who["hello"].get(name)
                if here != there:
                    raise DistributedError(rank, f"has another {name} than rank 0: {_told(there)}, not {_told(here)}")
        return dist.PrefixStore(f"{prefix}/{meeting}", store)

    def _connect(self, store: dist.Store, backend: str) -> None:
        """A group of two processes for each pair; apart from torch's registry, whose groups all ranks make together."""
        limit = timedelta(seconds=2 * self.timeout)  # longer than any wait here, which says more
        for other in range(1, self.world):
            if self.rank not in (0, other):
                continue
            peer, place = (other, 0) if self.rank == 0 else (0, 1)
            try:
                self._groups[peer] = dist.ProcessGroupGloo(dist.PrefixStore(f"gloo/{other}", store), place, 2, limit)
                if backend == "nccl":
                    options = dist.ProcessGroupNCCL.Options()
                    options._timeout = limit
                    self._data[peer] = dist.ProcessGroupNCCL(
                        dist.PrefixStore(f"nccl/{other}", store), place, 2, options
                    )
            except RuntimeError as error:
                self.close()
                raise DistributedError(peer, f"could not be connected with: {_first_line(error)}") from error

    def close(self) -> None:
        """Ends the connections; what is under way on the other side fails."""
        groups = [*self._groups.values(), *self._data.values()]
        self._groups, self._data = {}, {}
        # A group waits for what it has under way, at most the time-out, before it goes.
        threading.Thread(target=groups.clear).start()

    @property
    def others(self) -> Sequence[int]:
        """The ranks that this one is connected with."""
        return [*self._groups]

    def send(self, rank: int, tensor: Tensor, what: str) -> Posted:
        return self._post(rank, tensor, self.rank, what)

    def receive(self, rank: int, tensor: Tensor, what: str) -> Posted:
        return self._post(rank, tensor, rank, what)

    def _post(self, rank: int, tensor: Tensor, source: int, what: str) -> Posted:
        group = self._data[rank] if tensor.is_cuda and self._data else self._groups[rank]
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = (0 if source == 0 else 1), 0
        try:
            work = group.broadcast([tensor], options)
        except RuntimeError as error:
            raise self.broken_off(rank, error) from error
        return Posted(self, work, rank, tensor, what)

    def tell(self, rank: int, message: dict[str, Any], what: str, beside: Tensor | None = None) -> Posted:
        """Sends a few words, and a little data `beside` (uint8)."""
        text = json.dumps(message, ensure_ascii=False).encode()
        assert len(text) <= MESSAGE_BYTES, "a message is too long"
        tensor = torch.frombuffer(bytearray(text.ljust(MESSAGE_BYTES)), dtype=torch.uint8)
        return self.send(rank, tensor if beside is None else torch.cat([tensor, beside]), what)

    def listen(self, rank: int, what: str, beside: int = 0) -> Posted:
        """To what `tell` sends; `heard` gives the message."""
        tensor = torch.empty(MESSAGE_BYTES + beside, dtype=torch.uint8, device="cpu")
        return self.receive(rank, tensor, what)

    @staticmethod
    def heard(posted: Posted, deadline: float) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(bytes(posted.wait(deadline)[:MESSAGE_BYTES].numpy()))
        return message

    def broken_off(self, rank: int, error: Exception) -> Broken:
        return Broken(rank, f"broke off ({self._state(rank)}): {_first_line(error)}")

    def unanswered(self, rank: int, what: str) -> Broken:
        return Broken(rank, f"did not answer within {self.timeout:g} s ({what}; {self._state(rank)})")

    def _state(self, rank: int) -> str:
        """Of a rank's process, as far as it can be told from here."""
        host, pid = self._who[rank]["host"], self._who[rank]["pid"]
        if host != socket.gethostname():
            return f"process {pid} on {host}"
        for _ in range(20):  # a process that was killed takes a moment to go
            try:
                with open(f"/proc/{pid}/stat") as file:
                    state = file.read().rpartition(")")[2].split()[0]
            except OSError:
                state = "gone" if os.path.isdir("/proc/self") else ""
            if state in ("gone", "Z", "X", "T", "t"):
                break
            time.sleep(0.01)
        words = {"gone": "has ended", "Z": "has ended", "X": "has ended", "T": "is stopped", "t": "is stopped"}
        return f"process {pid} {words.get(state, 'is running')}"


def _told(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "…"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]
