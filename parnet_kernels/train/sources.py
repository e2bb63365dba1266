"""Pictures and their classes: folders in torchvision's layout, zip and tar files of one, and scikit-learn's digits."""

from __future__ import annotations

import hashlib
import io
import os
import random
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from parnet_kernels.app.sources import ENDINGS

TRAIN, VALIDATION = ("train", "training"), ("val", "valid", "validation", "test")
MAX_BYTES = 1 << 28  # of one picture file


class Reader(Protocol):
    """Bytes of the files of a data set; goes to worker processes."""

    def names(self) -> Iterator[str]:
        """Paths, with "/", below the root."""
        ...

    def read(self, name: str) -> bytes:
        """Raises OSError, naming the file."""
        ...


class Folder:
    def __init__(self, root: Path) -> None:
        self._root = root

    def names(self) -> Iterator[str]:
        for place, folders, files in os.walk(self._root, followlinks=True):
            here = Path(place).resolve()
            above = {here, *here.parents}  # a link to one of them would be followed for ever
            folders[:] = [n for n in folders if not n.startswith(".") and Path(place, n).resolve() not in above]
            inner = os.path.relpath(place, self._root)
            prefix = "" if inner == "." else inner.replace(os.sep, "/") + "/"
            for name in files:
                yield prefix + name

    def read(self, name: str) -> bytes:
        path = self._root / name
        if not path.is_file():  # a pipe would block
            raise OSError(f"{path} is not a file")
        if path.stat().st_size > MAX_BYTES:
            raise OSError(f"{path} has more than {MAX_BYTES >> 20} MiB")
        return path.read_bytes()


class Zip:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: tuple[int, zipfile.ZipFile] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"_path": self._path, "_open": None}

    def _file(self) -> zipfile.ZipFile:
        if self._open is None or self._open[0] != os.getpid():  # a position that two processes share is moved by both
            try:
                self._open = os.getpid(), zipfile.ZipFile(self._path)
            except (zipfile.BadZipFile, NotImplementedError) as error:
                raise ValueError(f"cannot read {self._path}: truncated, or not a zip file ({error})") from error
        return self._open[1]

    def names(self) -> Iterator[str]:
        for member in self._file().infolist():
            if not member.is_dir():
                yield member.filename

    def read(self, name: str) -> bytes:
        try:
            member = self._file().getinfo(name)
            if member.file_size > MAX_BYTES:
                raise OSError(f"more than {MAX_BYTES >> 20} MiB")
            return self._file().read(member)
        except Exception as error:  # a damaged archive may raise anything
            raise OSError(f"cannot read {name} in {self._path}: {error}") from error


class Tar:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[str, tuple[int, int]] = {}
        self._open: tuple[int, io.BufferedReader] | None = None
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if member.isfile() and not member.sparse:
                        self._places[member.name] = member.offset_data, member.size
        except tarfile.ReadError as error:
            compressed = path.open("rb").read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
            told = (
                "it is compressed, so that pictures in it cannot be found; decompress it" if compressed else str(error)
            )
            raise ValueError(f"cannot read {path}: {told}") from error

    def __getstate__(self) -> dict[str, object]:
        return {"_path": self._path, "_places": self._places, "_open": None}

    def names(self) -> Iterator[str]:
        yield from self._places

    def read(self, name: str) -> bytes:
        place, size = self._places[name]
        if size > MAX_BYTES:
            raise OSError(f"{name} in {self._path} has more than {MAX_BYTES >> 20} MiB")
        if self._open is None or self._open[0] != os.getpid():
            self._open = os.getpid(), self._path.open("rb")
        self._open[1].seek(place)
        content = self._open[1].read(size)
        if len(content) != size:
            raise OSError(f"cannot read {name} in {self._path}: the file is cut off")
        return content


class Digits:
    """scikit-learn's 1,797 handwritten digits, as PNG files of 32×32 pixels; one in four is for validation."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        raw = load_digits()
        order = random.Random(0).sample(range(len(raw.target)), len(raw.target))
        parts = {number: "val" if i < len(order) // 4 else "train" for i, number in enumerate(order)}
        self._images = {
            f"{parts[i]}/{label}/{i:04}.png": (raw.images[i] * (255 / 16)).round().astype("uint8")
            for i, label in enumerate(raw.target)
        }

    def names(self) -> Iterator[str]:
        yield from self._images

    def read(self, name: str) -> bytes:
        from PIL import Image

        content = io.BytesIO()
        Image.fromarray(self._images[name]).resize((32, 32), Image.Resampling.BILINEAR).save(content, "png")
        return content.getvalue()


class Sample(NamedTuple):
    name: str
    label: int


class Pictures(NamedTuple):
    reader: Reader
    class_names: tuple[str, ...]
    train: list[Sample]
    validation: list[Sample]
    warnings: list[str]

    def fingerprint(self) -> str:
        """Of what there is to learn: names of classes and pictures."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.train, self.validation):
            for name, label in part:
                digest.update(f"{label} {self.class_names[label]}\0{name}\0".encode("utf-8", "surrogateescape"))
            digest.update(b"\1")
        return digest.hexdigest()


def reader(data: str) -> Reader:
    """Raises:
    FileNotFoundError: there is nothing of that name.
    ImportError: digits without scikit-learn.
    ValueError: it is of another kind.
    """
    if data == "digits":
        return Digits()
    path = Path(data)
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        raise FileNotFoundError(f"no folder or file {path}")
    if not path.is_file():
        raise ValueError(f"{path} must be a folder, a zip or a tar file")
    return Zip(path) if zipfile.is_zipfile(path) else Tar(path)


def pictures(data: str, val_fraction: float, limit: int, seed: int) -> Pictures:
    """The data set `data`: parts `train` and one of `val`, `valid`, `validation`, `test`, each with a folder a class;
    or folders of classes alone, of which `val_fraction` is for validation. Folders around these are passed over.
    limit: see `Settings`.

    Raises:
        OSError: it cannot be read.
        ImportError: digits without scikit-learn.
        ValueError: it has not this form: the text says what is missing.
    """
    source = reader(data)
    split = [(parts, name) for name in sorted(source.names()) if (parts := _parts(name))]
    if not split:
        raise ValueError(f"{data} holds no pictures ({' '.join(sorted(ENDINGS))})")
    depth = 0
    while all(len(parts) > depth + 2 for parts, _ in split) and len({parts[depth] for parts, _ in split}) == 1:
        if split[0][0][depth].lower() in TRAIN:
            break
        depth += 1  # a folder around the data set
    tops = {parts[depth].lower(): parts[depth] for parts, _ in split}
    train = next((tops[name] for name in TRAIN if name in tops), None)
    parts_of = [tops[name] for name in VALIDATION if name in tops]
    if train is None and parts_of and all(len(parts) > depth + 2 for parts, _ in split):
        raise ValueError(f"{data}: there is a folder {parts_of[0]!r}, but none of training: 'train'")
    found: dict[str, dict[str, list[str]]] = {"train": {}, "validation": {}}
    warnings: list[str] = []
    if train is None:
        for parts, name in split:
            if len(parts) - depth < 2:
                raise ValueError(f"{data}: {name} is in no class: expected <class>/<file> or train/<class>/<file>")
            found["train"].setdefault(parts[depth], []).append(name)
        found["validation"] = _held_out(found["train"], val_fraction, seed)
    else:
        validation = parts_of[0] if parts_of else None
        if others := sorted(set(tops.values()) - {train, validation}):
            warnings.append(f"not used, beside {train!r} and {validation!r}: {', '.join(map(repr, others))}")
        for parts, name in split:
            if parts[depth] not in (train, validation):
                continue
            if len(parts) - depth < 3:
                raise ValueError(f"{data}: {name} is in no class: expected {parts[depth]}/<class>/<file>")
            part = "train" if parts[depth] == train else "validation"
            found[part].setdefault(parts[depth + 1], []).append(name)
        if validation is None:
            found["validation"] = _held_out(found["train"], val_fraction, seed)
    names = sorted(found["train"])
    if isinstance(source, Folder):
        place = Path(data, *split[0][0][:depth], *([train] if train else []))
        empty = {p.name for p in place.iterdir() if p.is_dir() and not p.name.startswith(".")} - set(names)
        if empty:
            raise ValueError(f"{data}: class {min(empty)!r} holds no pictures")
    if len(names) < 2:
        raise ValueError(f"{data}: training needs at least 2 classes, found {names}")
    if more := sorted(found["validation"].keys() - set(names)):
        raise ValueError(f"{data}: class {more[0]!r} is in the validation part only")
    if less := [name for name in names if not found["validation"].get(name)]:
        if len(less) == len(names):
            warnings.append("there are no pictures for validation: the best checkpoint is the last")
        else:
            some = ", ".join(map(repr, less[:3])) + (" …" if len(less) > 3 else "")
            warnings.append(f"{len(less)} of {len(names)} classes have no pictures for validation: {some}")
    if single := [name for name in names if len(found["train"][name]) == 1]:
        warnings.append(f"{len(single)} of {len(names)} classes have one training picture, such as {single[0]!r}")
    kept = {name: files[:limit] if limit else files for name, files in found["train"].items()}
    return Pictures(
        source,
        tuple(names),
        [Sample(name, i) for i, c in enumerate(names) for name in kept[c]],
        [Sample(name, i) for i, c in enumerate(names) for name in found["validation"].get(c, [])],
        warnings,
    )


def _parts(name: str) -> tuple[str, ...] | None:
    """The folders and the name of a picture's path; None for other files and for what is hidden."""
    if os.path.splitext(name)[1].lower() not in ENDINGS:
        return None
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    return None if any(part.startswith((".", "__MACOSX")) for part in parts) else parts


def _held_out(train: Mapping[str, list[str]], fraction: float, seed: int) -> dict[str, list[str]]:
    """Takes pictures out of `train`, the same ones for a seed; each class keeps at least one."""
    found = {}
    for name, files in train.items():
        count = min(round(len(files) * fraction), len(files) - 1)
        chosen = set(random.Random(f"{seed} {name}").sample(files, count))
        found[name] = sorted(chosen)
        files[:] = [file for file in files if file not in chosen]
    return found
