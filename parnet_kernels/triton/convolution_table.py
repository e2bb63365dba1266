"""The measured table of convolutions: its file, and why one is not read. `python -m bench convolutions` writes it.

A file is of one model of GPU and lies beside the tiles' (`policy.table_path`):

    {"model": …, "entries": {key: {"which": "library" or "own", "source": …, …}}}

The keys are those of `convolutions.key`. The rest of an entry, such as the times, is for people.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parnet_kernels.files import write_whole
from parnet_kernels.triton import policy

LIBRARY, OWN = "library", "own"
Entries = dict[str, dict[str, Any]]


def table_path(model: str) -> Path:
    """model: as `policy.model` names it."""
    path = policy.table_path(model)
    return path.with_name(path.name.replace("triton-", "convolutions-", 1))


def read(model: str) -> Entries:
    """What the file of this model holds; nothing where there is none.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such table, or another model's.
    """
    try:
        table = json.loads(table_path(model).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except RecursionError:
        raise ValueError("it is no table: nested too deeply") from None
    entries = table.get("entries") if isinstance(table, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError('it is no table: "entries" with an entry for each key are not there')
    if (found := table.get("model")) != model:
        raise ValueError(f"it was measured on {found!r}, this is {model!r}")
    if wrong := {str(entry.get("which")) for entry in entries.values()} - {LIBRARY, OWN}:
        raise ValueError(f'"which" must be {LIBRARY!r} or {OWN!r}, got {sorted(wrong)[0]!r}')
    return entries


@functools.cache
def measured(model: str) -> dict[str, str]:
    """{key: LIBRARY or OWN}. A file that cannot be read is reported once and ignored."""
    try:
        return {key: entry["which"] for key, entry in read(model).items()}
    except (OSError, ValueError) as error:
        warnings.warn(f"parnet_kernels: ignoring the table {table_path(model)}: {error}", stacklevel=2)
        return {}


def told(model: str) -> str:
    """What `parnet info` says of the table."""
    try:
        entries = read(model)
    except (OSError, ValueError) as error:
        return f"the library's by arithmetic; ignoring {table_path(model)}: {error}"
    if not entries:
        return "the library's by arithmetic; not measured (python -m bench convolutions --write)"
    own = sum(entry["which"] == OWN for entry in entries.values())
    sources = sorted({str(entry.get("source", "an unknown source")) for entry in entries.values()})
    more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    return f"{own} of {len(entries)} measured ones are ours: {table_path(model)}, from {sources[-1]}{more}"


def why_not_write(model: str) -> str | None:
    """Why `write` would fail, or None: before a measurement of minutes."""
    path = table_path(model)
    try:
        read(model)
    except (OSError, ValueError) as error:
        return f"{path} is there and cannot be added to: {error}; remove it first"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name}.writable")
        write_whole(probe, b"")
        probe.unlink()
    except OSError as error:
        return f"{path} cannot be written: {error.__cause__ or error}"
    return None


def write(model: str, entries: Mapping[str, Mapping[str, Any]]) -> Path:
    """Adds entries to the table of this model, in place of those with the same keys; a reader sees all or nothing.

    Raises:
        OSError: it cannot be written, or what is there cannot be read.
        ValueError: what is there is no such table.
    """
    path = table_path(model)
    merged = {**read(model), **entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text(model, merged).encode())
    measured.cache_clear()
    return path


def text(model: str, entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Of a file."""
    return json.dumps({"model": model, "entries": entries}, indent=1, sort_keys=True) + "\n"
