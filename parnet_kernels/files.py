"""Files that appear when they are complete."""

from __future__ import annotations

import os
from pathlib import Path


def check_target(path: str | Path, what: str) -> None:
    """Before anything is made: whether a file can be written at `path`.

    Raises:
        OSError: it cannot, because of its folder or because it is no file.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{what}: `path` must be a file, got the folder {path}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{what}: no folder {path.absolute().parent}")


def write_whole(path: str | Path, content: bytes) -> None:
    """Writes a file that is there only when it is complete, with the permissions of any new file.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        part.unlink(missing_ok=True)
