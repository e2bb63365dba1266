"""Files of torch.save, read without executing anything in them, and without believing what they declare."""

from __future__ import annotations

import argparse
import io
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._utils import IMPORT_MAPPING, NAME_MAPPING

from parnet_kernels.locks import Lock


class CheckpointError(ValueError):
    """A file or dict that is not a ParNet; the text names it and says what is wrong."""


class _Nothing:
    """Stands for an object of a class that is not loaded."""

    def __init__(self, *_: object) -> None: ...
    def __setstate__(self, _: object) -> None: ...


#: What NumPy's numbers and arrays are made of; training scripts keep metrics in them.
_NUMPY = (
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{f}" for core in ("core", "_core") for f in ("scalar", "_reconstruct")),
)
_allowed = Lock()  # torch's list of allowed classes is one for all threads


def read_archive(path: Path, ignore_classes: bool) -> Any:
    """What torch.save wrote, by torch.load(weights_only=True): tensors, numbers, texts and containers. Namespaces of
    argparse (the training script's options) are kept; in place of NumPy's numbers and arrays, and with `ignore_classes`
    of objects of any class, stands an object without content.

    Raises:
        CheckpointError: the file is truncated, of another kind, declares more than it holds, or needs another class.
    """
    try:
        names = _globals(path)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive may raise anything
        raise CheckpointError(f"cannot read {path}: truncated, or not a PyTorch checkpoint ({error})") from error
    if "builtins.bytearray" in names:  # makes any number of bytes out of one number
        raise CheckpointError(f"cannot read {path}: it needs bytearray, which may not be loaded")
    ignored = {*_NUMPY, *(names if ignore_classes else ())} - {"argparse.Namespace"}
    allowed: list[Any] = [argparse.Namespace, *((_Nothing, name) for name in ignored)]
    try:
        # A name that torch itself allows means the same as ever: its own list goes first.
        with _allowed, torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise CheckpointError(f"cannot read {path}: it is not a PyTorch checkpoint") from error
        reason = f"it needs GLOBAL {refused[1]}, which may not be loaded"
        if "is blocked" not in str(error):  # of what only attacks need, torch leaves nothing out
            reason += "; ignore_classes=True (--ignore-classes) leaves such objects out and reads the rest"
        raise CheckpointError(f"cannot read {path}: {reason}") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"cannot read {path}: truncated, or not a PyTorch checkpoint ({error})") from error


def _globals(path: Path) -> set[str]:
    """Names of the classes and functions that the file asks for, as far as its pickle can be read."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # the format before torch 1.6: several pickles, then numbers
            file.seek(0)
            return set().union(*(_named(file) for _ in range(5)))
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        declared, held = sum(member.file_size for member in members), path.stat().st_size
        if declared > held:  # torch.save does not compress
            raise CheckpointError(f"cannot read {path}: it declares {declared} bytes and holds {held}")
        if len({member.filename for member in members}) < len(members):
            raise CheckpointError(f"cannot read {path}: two of its members have one name")
        found: set[str] = set()
        for member in members:
            if member.filename.endswith("data.pkl"):
                member.CRC = None  # type: ignore[assignment]  # torch.save may leave it out
                found |= _named(io.BytesIO(archive.read(member)))
        return found


def _named(file: BinaryIO | io.BytesIO) -> set[str]:
    """What a pickle asks for, by the names that torch.load gives them: `__builtin__` is Python 2's `builtins`."""
    found = set()
    try:
        for code, argument, _ in pickletools.genops(file):
            if code.name == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
                found.add(f"{module}.{name}")
    except ValueError:  # what torch.load makes of the rest is its matter
        pass
    return found
