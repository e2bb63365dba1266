"""Where results go: a table, JSON, JSON lines or CSV, written as they come; and taking up a file that was cut short."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import typer
from rich.console import Console

from parnet_kernels.app.console import print_table
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.preprocessing import Preprocessing
from parnet_kernels.quantized import QuantizedParNet


class Format(StrEnum):
    table = "table"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"

    @classmethod
    def of(cls, path: Path | None) -> Format:
        """By the ending of a file's name."""
        ending = path.suffix.lower().removeprefix(".") if path else ""
        return cls(ending) if ending in ("json", "jsonl", "csv") else cls.table


RESUMABLE = (Format.jsonl, Format.csv)


class Result(NamedTuple):
    """Of one picture: for the most probable classes `class`, `label` and `probability`."""

    image: str
    top: list[dict[str, Any]]


class Writer(ABC):
    """Takes results in batches; each is in the file, or on the way through the pipe, when `write` returns."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, results: list[Result]) -> None:
        if results:
            self._put("".join(map(self._text, results)))

    def close(self) -> None:
        """Writes what stands after all results."""
        self._stream.flush()

    @abstractmethod
    def _text(self, result: Result) -> str:
        """One picture's part of the file."""

    def _put(self, text: str) -> None:
        # Names of files that are not UTF-8 get back the bytes they have.
        self._stream.write(text.encode("utf-8", "surrogateescape"))
        self._stream.flush()


class JsonLines(Writer):
    def _text(self, result: Result) -> str:
        return json.dumps(result._asdict()) + "\n"


class Json(Writer):
    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream)
        self._before = "[\n"

    def _text(self, result: Result) -> str:
        before, self._before = self._before, ",\n"
        return before + json.dumps(result._asdict(), indent=2)

    def close(self) -> None:
        self._put("[]\n" if self._before == "[\n" else "\n]\n")


COLUMNS = ("image", "rank", "class", "label", "probability")


class Csv(Writer):
    def __init__(self, stream: BinaryIO, header: bool = True) -> None:
        super().__init__(stream)
        if header:
            self._put(",".join(COLUMNS) + "\n")

    def _text(self, result: Result) -> str:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        for rank, entry in enumerate(result.top, 1):
            rows.writerow((result.image, rank, entry["class"], entry["label"], repr(entry["probability"])))
        return text.getvalue()


class Table:
    """For people: on a terminal drawn at the end, or when it has become long; else tab-separated lines as they come."""

    LONG = 500  # lines

    def __init__(self, console: Console) -> None:
        self._console = console
        self._header: tuple[str, ...] = ("image", "class", "probability")
        self._rows: list[tuple[str, str, str]] = []

    def write(self, results: list[Result]) -> None:
        self._rows += [
            (result.image, entry["label"], f"{entry['probability']:.2%}") for result in results for entry in result.top
        ]
        if not self._console.is_terminal or len(self._rows) > self.LONG:
            self.close()

    def close(self) -> None:
        if self._rows:
            print_table(self._console, self._header, self._rows)
            if not self._console.is_terminal:
                self._header = ()
                self._console.file.flush()
        self._rows = []


def writer(form: Format, path: Path | None, goes_on: bool = False) -> Writer | Table:
    """Of the file `path`, which must not exist unless it `goes_on`, or of standard output.

    Raises:
        typer.BadParameter: the file is there.
        OSError: it cannot be written.
    """
    if path is None:
        sys.stdout.flush()
        stream: Any = sys.stdout.buffer
    else:
        try:
            stream = path.open("ab" if goes_on else "xb", buffering=0)
        except FileExistsError as error:
            raise typer.BadParameter(f"{path} exists: --resume goes on with it (.jsonl, .csv); or remove it") from error
        except OSError as error:
            raise OSError(f"cannot write {path}: {error}") from error
    if form is Format.table:
        return Table(Console(file=io.TextIOWrapper(stream, "utf-8", "surrogateescape")) if path else Console())
    if form is Format.csv:
        return Csv(stream, header=path is None or not path.stat().st_size)
    return Json(stream) if form is Format.json else JsonLines(stream)


def settings(network: DeployedParNet | QuantizedParNet, preprocessing: Preprocessing, top: int) -> dict[str, Any]:
    """What results depend on besides the pictures."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    names = json.dumps(network.class_names).encode()
    return {
        "network": digest.hexdigest(),
        "activation": network.config.activation,
        "preprocessing": str(preprocessing),
        "class names": hashlib.blake2b(names, digest_size=16).hexdigest(),
        "top": top,
    }


def _note(path: Path) -> Path:
    """Says what made the results in `path`, so that those of different networks are never mixed."""
    return path.with_name(f"{path.name}.run.json")


def note_settings(path: Path, made_by: dict[str, Any]) -> None:
    """For `resumed`; unless `path` is there, which is someone else's.

    Raises:
        OSError: the folder cannot be written.
    """
    if path.exists():
        return
    try:
        _note(path).write_text(json.dumps(made_by, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OSError(f"cannot write {_note(path)}: {error}") from error


def resumed(path: Path, form: Format, made_by: dict[str, Any]) -> set[str] | None:
    """Prepares `path` for more results: cuts off what was only half written. Returns the pictures that it has; None if
    there is no such file.

    Raises:
        typer.BadParameter: `path` has results of other settings, or something else.
    """
    if not path.exists():
        return None
    try:
        before = json.loads(_note(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{_note(path)}, which says what made {path}, cannot be read: {error}") from error
    others = [key for key, value in made_by.items() if not isinstance(before, dict) or before.get(key) != value]
    if others:
        raise typer.BadParameter(f"{path} was made with another {', '.join(others)}")
    found, end = _done(path, form, made_by["top"])
    with path.open("r+b") as file:
        file.truncate(end)
    return found


def _done(path: Path, form: Format, top: int) -> tuple[set[str], int]:
    """(pictures with whole results, bytes that these take). What follows the last whole result was cut short."""
    found: set[str] = set()
    whole = 0
    with path.open("rb") as file:
        for image, end in _json_lines(file) if form is Format.jsonl else _csv_rows(file, top):
            if image is not None:
                found.add(image)
            whole = end
        if file.seek(0, io.SEEK_END) - whole > 1 << 20:
            raise typer.BadParameter(f"{path} is no {form.value} file of results from byte {whole} on")
    return found, whole


def _json_lines(file: BinaryIO) -> Iterator[tuple[str, int]]:
    """(picture, where its result ends), as far as lines are results."""
    end = 0
    for line in file:
        end += len(line)
        try:
            image = json.loads(line)["image"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return
        if not line.endswith(b"\n") or not isinstance(image, str):
            return
        yield image, end


def _csv_rows(file: BinaryIO, top: int) -> Iterator[tuple[str | None, int]]:
    """(picture, where its `top` rows end), as far as rows are results; None for the header."""
    end = 0

    def lines() -> Iterator[str]:
        nonlocal end
        for line in file:
            end += len(line)
            if not line.endswith(b"\n"):
                return
            yield line.decode("utf-8", "surrogateescape")

    rows = csv.reader(lines(), strict=True)
    try:
        if tuple(next(rows, ())) != COLUMNS:
            return
        yield None, end
        while True:
            group = [next(rows) for _ in range(top)]
            if [row[:2] for row in group] != [[group[0][0], str(rank)] for rank in range(1, top + 1)]:
                return
            yield group[0][0], end
    except (StopIteration, RuntimeError, csv.Error):
        return
