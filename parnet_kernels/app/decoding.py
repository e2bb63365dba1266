"""Picture files → pixels as the network wants them, in worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from parnet_kernels.app.images import fitted, open_image, pixels_of
from parnet_kernels.preprocessing import Preprocessing


class Chunk(NamedTuple):
    """Some pictures: those that could be read, their pixels, and why the others could not."""

    paths: list[str]
    pixels: np.ndarray  # uint8 [N, height, width, C]: after cutting, all have one shape
    errors: list[tuple[str, str]]  # (path, reason)


class _Chunks(Dataset[Chunk]):
    def __init__(self, paths: list[str], preprocessing: Preprocessing, batch: int) -> None:
        self._paths = np.array([path.encode("utf-8", "surrogateescape") for path in paths], dtype=object)
        self._preprocessing = preprocessing
        self._batch = batch

    def __len__(self) -> int:
        return -(-len(self._paths) // self._batch)

    def __getitem__(self, i: int) -> Chunk:
        p = self._preprocessing
        paths: list[str] = []
        errors: list[tuple[str, str]] = []
        pixels = np.empty((self._batch, p.height, p.width, p.channels), dtype=np.uint8)
        for name in self._paths[i * self._batch : (i + 1) * self._batch]:
            path = name.decode("utf-8", "surrogateescape")
            try:
                pixels[len(paths)] = fitted(pixels_of(open_image(path, p.color), p), p, path).numpy()
                paths.append(path)
            except Exception as error:  # of this picture: damaged files make decoders raise anything
                errors.append((path, str(error) if isinstance(error, OSError | ValueError) else f"{path}: {error!r}"))
        return Chunk(paths, pixels[: len(paths)], errors)


def _as_it_is(chunk: Any) -> Any:
    return chunk


def decoded(paths: list[str], preprocessing: Preprocessing, batch: int, workers: int) -> Iterator[Chunk]:
    """The pictures, in order, `batch` at a time; 0 workers: decoded here.

    Raises:
        RuntimeError: a worker was killed.
    """
    # NumPy arrays go through pipes; tensors would take shared memory, of which containers have little.
    loader = DataLoader(
        _Chunks(paths, preprocessing, batch),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        prefetch_factor=2 if workers else None,
    )
    yield from loader
