"""Batches of pictures. Everything random is a function of (seed, epoch, picture): neither worker processes, nor ranks,
nor where a run was cut and resumed change a bit of it.
"""

from __future__ import annotations

import io
import signal
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from parnet_kernels.app.images import fitted, normalised, pixels_of, upright
from parnet_kernels.preprocessing import Preprocessing
from parnet_kernels.train.augmentation import Augmentation
from parnet_kernels.train.sources import Reader, Sample

#: Training pictures that are tried in place of one that cannot be read.
INSTEAD = 16


class Batch(NamedTuple):
    x: Tensor  # [N, C, size, size], float32
    y: Tensor  # [N], int64
    problems: list[tuple[str, str]]  # (picture, what is wrong with it)
    fatal: str = ""  # why training cannot go on


Part = tuple[int, list[int]]  # epoch, numbers of pictures


def opened(reader: Reader, name: str, color: str) -> tuple[Image.Image, str | None]:
    """(the picture, a remark about it).

    Raises:
        OSError, ValueError: it cannot be read; the text names it.
    """
    content = reader.read(name)
    if not content:
        raise OSError(f"{name} is empty")
    remark = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, for each picture of each epoch
            with Image.open(io.BytesIO(content)) as file:
                # Cameras write files of format MPO, the picture and small ones of it.
                if file.format != "MPO" and (frames := getattr(file, "n_frames", 1)) > 1:
                    remark = f"it is animated, or of several pages, {frames} in all: the first is taken"
                image = upright(file, color, name)
    except Exception as error:  # damaged files make decoders raise anything
        raise OSError(f"cannot read the picture {name}: {error}") from error
    if 0 in image.size:
        raise OSError(f"{name} has no pixels")
    return image, remark


class Training(Dataset[Batch]):
    """Item (epoch, numbers of pictures): their batch, augmented."""

    def __init__(
        self, reader: Reader, samples: list[Sample], seed: int, augmentation: Augmentation, color: str
    ) -> None:
        self._reader, self._samples, self._seed = reader, samples, seed
        self._augmentation, self._color = augmentation, color

    def __getitem__(self, item: tuple[int, Sequence[int]]) -> Batch:
        epoch, numbers = item
        xs: list[Tensor] = []
        ys: list[int] = []
        problems: list[tuple[str, str]] = []
        with torch.random.fork_rng(devices=[]):
            for number in numbers:
                try:
                    x, label = self._one(epoch, number, problems)
                except OSError as error:
                    return Batch(torch.empty(0), torch.empty(0), problems, str(error))
                xs.append(x)
                ys.append(label)
        return Batch(torch.stack(xs), torch.tensor(ys), problems)

    def _one(self, epoch: int, number: int, problems: list[tuple[str, str]]) -> tuple[Tensor, int]:
        """The picture; the next one that can be read, in place of one that cannot."""
        reason = ""
        for offset in range(min(INSTEAD, len(self._samples))):
            name, label = self._samples[(number + offset) % len(self._samples)]
            try:
                image, remark = opened(self._reader, name, self._color)
                torch.manual_seed(mixed(self._seed, epoch, number))
                x = self._augmentation(image, name)
            except (OSError, ValueError) as error:
                reason = str(error)
                problems.append((name, reason))
                continue
            if remark:
                problems.append((name, remark))
            return x, label
        raise OSError(f"{min(INSTEAD, len(self._samples))} pictures in a row cannot be read, the last: {reason}")


class Validation(Dataset[Batch]):
    """Item (0, numbers of pictures): those that can be read, as `Classifier` and `parnet predict` prepare them."""

    def __init__(self, reader: Reader, samples: list[Sample], preprocessing: Preprocessing) -> None:
        self._reader, self._samples, self._preprocessing = reader, samples, preprocessing

    def __getitem__(self, item: tuple[int, Sequence[int]]) -> Batch:
        p = self._preprocessing
        pixels, ys, problems = [], [], []
        for number in item[1]:
            name, label = self._samples[number]
            try:
                image, remark = opened(self._reader, name, p.color)
                pixels.append(fitted(pixels_of(image, p), p, name))
            except (OSError, ValueError) as error:
                problems.append((name, f"left out of validation: {error}"))
                continue
            ys.append(label)
            if remark:
                problems.append((name, remark))
        return Batch(normalised(pixels, p), torch.tensor(ys, dtype=torch.int64), problems)


def mixed(*numbers: int) -> int:
    """A seed for PyTorch's generator, which takes neighbouring ones for unrelated."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def order(count: int, seed: int, epoch: int) -> Tensor:
    """Of the pictures in an epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed(seed, epoch)))


def training_parts(
    count: int, seed: int, epoch: int, first: int, batch: int, rank: int, world: int, accumulate: int
) -> Iterator[Part]:
    """What this rank takes from step `first` of the epoch on, `accumulate` parts a step: of the pictures of a step,
    neighbours for each part, in it for each rank. A batch that is not full is left out.
    """
    pictures, share = order(count, seed, epoch), batch // (world * accumulate)
    for step in range(first, count // batch):
        for part in range(accumulate):
            begin = step * batch + (part * world + rank) * share
            yield epoch, pictures[begin : begin + share].tolist()


def validation_parts(count: int, batch: int, rank: int, world: int) -> Iterator[Part]:
    for begin in range(0, count, batch * world):
        numbers = range(begin + rank * batch, min(count, begin + (rank + 1) * batch))
        if numbers:
            yield 0, [*numbers]


def _in_worker(_: int) -> None:
    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # see `ranks`


def _as_arrays(batch: Any) -> Any:
    """Arrays go through pipes; tensors would take shared memory, of which containers have little."""
    return batch._replace(x=batch.x.numpy(), y=batch.y.numpy())


class Feed:
    """Reads batches in `workers` processes, which stay from epoch to epoch; 0: here."""

    def __init__(self, dataset: Training | Validation, workers: int) -> None:
        self._parts: list[Part] = []
        self._loader: DataLoader[Batch] = DataLoader(
            dataset,
            batch_size=None,
            sampler=self,
            num_workers=workers,
            collate_fn=_as_arrays,
            persistent_workers=bool(workers),
            worker_init_fn=_in_worker,
        )

    def __iter__(self) -> Iterator[Part]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def read(self, parts: Iterable[Part]) -> Iterator[Batch]:
        """Batches of the parts, in their order.

        Raises:
            OSError: too many pictures cannot be read.
            RuntimeError: a process was killed, as PyTorch says it.
        """
        self._parts[:] = parts
        for batch in self._loader:
            if batch.fatal:
                raise OSError(batch.fatal)
            yield batch._replace(x=torch.from_numpy(batch.x), y=torch.from_numpy(batch.y))
