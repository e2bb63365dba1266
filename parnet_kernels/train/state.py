"""Checkpoints of a run: the network in a file that `load_checkpoint` reads, and beside it what training goes on from.

`last.safetensors` and `best.safetensors` hold the network that was validated (of averages, if the run keeps them).
Beside each stands `<name>.state-<step>.safetensors`: momentum, the weights that are trained where these are others,
and counters. Two files cannot appear at once, so the state names the network it belongs to, by its digest, and the old
state is removed last: at every moment there is a network with its state.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from parnet_kernels.checkpoint import CheckpointError, load_checkpoint, serialized
from parnet_kernels.files import write_whole
from parnet_kernels.model import ParNet

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


class Owned:
    """The folder of a run, which no other process uses meanwhile, as far as the file system knows locks."""

    WAIT = 10  # seconds: processes that read pictures outlive the one that was killed for a moment

    def __init__(self, folder: Path) -> None:
        """Raises:
        OSError: another process owns it.
        """
        self._file, self._process = -1, os.getpid()
        if fcntl is None:
            return
        self._file = os.open(folder, os.O_RDONLY)
        deadline = time.monotonic() + self.WAIT
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    self.release()
                    raise OSError("another process trains there") from error
                time.sleep(0.2)
            except OSError:  # a file system without locks
                self.release()
                break

    def release(self) -> None:
        if self._file >= 0:
            if os.getpid() == self._process:  # the lock is shared with forked processes, which read pictures
                with contextlib.suppress(OSError):
                    fcntl.flock(self._file, fcntl.LOCK_UN)
            os.close(self._file)
        self._file = -1

    def __del__(self) -> None:
        self.release()


class Point(NamedTuple):
    """Where a run stands."""

    network: ParNet
    tensors: dict[str, Tensor]  # momentum.<parameter>, weight.<entry>
    progress: dict[str, Any]  # numbers and texts: step, settings, …


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _states(folder: Path, name: str) -> list[Path]:
    pattern = re.compile(re.escape(name) + r"\.state-\d+\.safetensors")
    return [path for path in folder.iterdir() if pattern.fullmatch(path.name)]


def write(folder: Path, name: str, point: Point) -> None:
    """Raises:
    OSError: it cannot be written; what was there before is as it was.
    """
    network = serialized(point.network)
    progress = json.dumps({**point.progress, "network": _digest(network)})
    state = folder / f"{name}.state-{point.progress['step']}.safetensors"
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in point.tensors.items()}
    write_whole(state, serialize(tensors, {"parnet_training": progress}))
    write_whole(folder / f"{name}.safetensors", network)
    for path in _states(folder, name):
        if path != state:
            path.unlink(missing_ok=True)


def exists(folder: Path) -> bool:
    """Whether there is a run in `folder`, with something to lose."""
    return any((folder / f"{name}.safetensors").exists() for name in ("last", "best"))


def read(folder: Path, name: str) -> Point | None:
    """The checkpoint `name`; None if there is none.

    Raises:
        CheckpointError: it is damaged, or its state is missing.
    """
    path = folder / f"{name}.safetensors"
    if not path.exists():
        return None
    digest = _digest(path.read_bytes())
    for state in _states(folder, name):
        try:
            with safe_open(state, "pt") as file:
                progress = json.loads((file.metadata() or {}).get("parnet_training", "{}"))
                if progress.get("network") != digest:
                    continue
                kinds = {"step": int, "best": float, "sums": list, "settings": dict}
                if wrong := [key for key, kind in kinds.items() if not isinstance(progress.get(key), kind)]:
                    raise ValueError(f"its {wrong[0]!r} is {progress.get(wrong[0])!r}")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        except (SafetensorError, ValueError, RecursionError) as error:
            raise CheckpointError(f"cannot read {state}: truncated, or not a state of training ({error})") from error
        return Point(load_checkpoint(path), tensors, progress)
    raise CheckpointError(
        f"{path} has no state to go on from ({name}.state-….safetensors): --init starts from its weights"
    )
