"""Which pictures a command was given: files, folders, patterns and lists of paths; and this process's share of them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import typer

#: Files of a folder that are taken for pictures; a file that is named is taken whatever its name.
ENDINGS = frozenset(
    ".avif .bmp .gif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp".split()  # noqa: SIM905
)


def listed(path: Path) -> list[str]:
    """The lines of a text file: UTF-8 with or without a byte-order mark, names of files in other encodings as they are;
    only line feeds part lines. Empty lines at the end of the file are none.

    Raises:
        typer.BadParameter: what is no file (a pipe would block), or cannot be read.
    """
    if path.exists() and not path.is_file():
        raise typer.BadParameter(f"{path} must be a text file")
    try:
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    except OSError as error:
        raise typer.BadParameter(f"cannot read {path}: {error}") from error
    return [line.rstrip("\r") for line in text.rstrip("\r\n").split("\n")]


def pictures(names: Sequence[str], lists: Sequence[Path]) -> list[str]:
    """Paths, in the order given; those of folders (with what is below them; nothing hidden) and patterns sorted.

    Raises:
        typer.BadParameter: nothing is given, a folder or list holds no picture, a pattern matches none.
    """
    found: list[str] = []
    for name in names:
        if os.path.isdir(name):
            part = sorted(_below(name))
            if not part:
                raise typer.BadParameter(f"the folder {name} holds no pictures ({' '.join(sorted(ENDINGS))})")
        elif glob.has_magic(name) and not os.path.lexists(name):
            part = sorted(path for path in glob.glob(name, recursive=True) if not os.path.isdir(path))
            if not part:
                raise typer.BadParameter(f"the pattern {name} matches no file")
        else:
            part = [name]
        found += part
    for path in lists:
        part = [line for line in listed(path) if line]
        if not part:
            raise typer.BadParameter(f"{path} lists no pictures")
        found += part
    if not found:
        raise typer.BadParameter("no pictures: name files, folders or patterns, or give --list")
    return found


def _below(folder: str) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in ENDINGS:
                yield os.path.join(place, name)


class Share(NamedTuple):
    """This process's share of the work, as torchrun and others say it: every `world`-th picture from `rank` on."""

    rank: int = 0
    world: int = 1
    here: int = 1  # processes on this machine

    @classmethod
    def of_environment(cls) -> Share:
        """From RANK and WORLD_SIZE, if both are set.

        Raises:
            typer.BadParameter: they are no numbers that fit each other.
        """
        rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        if rank is None or world is None:
            return cls()
        if not (rank.isascii() and rank.isdigit() and world.isascii() and world.isdigit() and int(rank) < int(world)):
            raise typer.BadParameter(f"RANK and WORLD_SIZE must be 0 ≤ RANK < WORLD_SIZE, got {rank!r} and {world!r}")
        here = os.environ.get("LOCAL_WORLD_SIZE", "1")
        return cls(int(rank), int(world), max(1, int(here)) if here.isascii() and here.isdigit() else 1)

    def of(self, paths: list[str]) -> list[str]:
        return paths[self.rank :: self.world]

    def file(self, path: Path) -> Path:
        """Where this process writes what would go to `path` otherwise: results.0-of-2.csv for results.csv."""
        return path if self.world == 1 else path.with_name(f"{path.stem}.{self.rank}-of-{self.world}{path.suffix}")


def without(paths: Iterable[str], done: set[str]) -> list[str]:
    return [path for path in paths if path not in done] if done else [*paths]
