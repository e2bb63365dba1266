"""Image files → network input, as ImageNet models are evaluated: resize, centre crop, normalise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from parnet_kernels.preprocessing import Preprocessing

MAX_PIXELS = 180_000_000  # after resizing; half a gigabyte


def _eight_bits(image: Image.Image, file_format: str | None, path: Path) -> Image.Image:
    """Grey values of 16 bits in 8, by the format's range: that of modes I;16, and of mode I in PNG and PNM files, whose
    values Pillow scales to 0…65535. Pixels of 32 bits have no range that is known.

    Raises:
        ValueError: for these.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    if not (image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM"))):
        raise ValueError(f"{path} has pixels of mode {image.mode} without a known range: convert it to 8 or 16 bits")
    return Image.fromarray((np.asarray(image).astype(np.float64) / 257 + 0.5).astype(np.uint8))


def open_image(path: str | Path, color: str) -> Image.Image:
    """The picture as Pillow has it, upright, in 8 bits: mode "L" for colour "gray", else "RGB".

    Raises:
        OSError: no such file, not an image, a damaged one, or one whose pixels have no known range.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe would block
        raise OSError(f"{path} is not a file")
    try:
        with Image.open(path) as file:
            narrow = _eight_bits(ImageOps.exif_transpose(file), file.format, path)
            return narrow.convert("L" if color == "gray" else "RGB")
    except UnidentifiedImageError as error:
        raise OSError(f"{path} is not an image") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no image file {path}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"cannot read the image {path}: {error}") from error


def load_image(path: str | Path, preprocessing: Preprocessing) -> Tensor:
    """The input for a picture file, [1, C, size, size], float32, as `preprocessing` says.

    Raises:
        OSError: no such file, not an image, a damaged one, or one whose pixels have no known range.
        ValueError: an image too elongated to be resized.
    """
    p, size = preprocessing, preprocessing.size
    image = open_image(path, p.color)
    scale = size / p.crop / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if width * height > MAX_PIXELS:
        raise ValueError(f"{path} is too elongated: its {image.width}×{image.height} pixels become {width}×{height}")
    image = image.resize((width, height), Image.Resampling[p.interpolation.upper()])
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    x = torch.from_numpy(pixels.reshape(size, size, p.channels)).permute(2, 0, 1)[None]
    if p.color == "bgr":
        x = x.flip(1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (p.mean, p.std))
    return ((x - mean) / std).contiguous()
