"""Pictures → network input: image files, frames and Pillow's images, by the steps that a `Preprocessing` names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from parnet_kernels.preprocessing import Preprocessing

MAX_PIXELS = 180_000_000  # after resizing; half a gigabyte


def _eight_bits(image: Image.Image, file_format: str | None, path: object) -> Image.Image:
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


def upright(image: Image.Image, color: str, name: object) -> Image.Image:
    """`image` as its EXIF orientation shows it, in 8 bits: mode "L" for colour "gray", else "RGB".

    Raises:
        OSError: pixels cannot be read.
        ValueError: they have no known range.
    """
    # What turns the picture may lose the format.
    return _eight_bits(ImageOps.exif_transpose(image), image.format, name).convert("L" if color == "gray" else "RGB")


def open_image(path: str | Path, color: str) -> Image.Image:
    """The picture in a file, `upright`.

    Raises:
        OSError: no such file, not an image, a damaged one, or one whose pixels have no known range.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe would block
        raise OSError(f"{path} is not a file")
    try:
        with Image.open(path) as file:
            return upright(file, color, path)
    except UnidentifiedImageError as error:
        raise OSError(f"{path} is not an image") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no image file {path}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"cannot read the image {path}: {error}") from error


def pixels_of(image: Image.Image, p: Preprocessing) -> Tensor:
    """uint8 [H, W, C] of an `upright` picture, its channels in the network's order."""
    array = np.array(image)
    pixels = torch.from_numpy(array.reshape(image.height, image.width, p.channels))
    return pixels.flip(2) if p.color == "bgr" else pixels


def geometry(sides: tuple[int, int], p: Preprocessing, name: object) -> tuple[tuple[int, int], slice, slice]:
    """Of a picture with `sides` pixels, height before width: (its sides when it is resized, the rows and the columns
    that are cut out).

    Raises:
        ValueError: a picture without pixels, or too elongated to be resized.
    """
    if min(sides) == 0:
        raise ValueError(f"{name} has no pixels: {sides[1]}×{sides[0]}")
    scale = max(p.height / p.crop / sides[0], p.width / p.crop / sides[1])  # of the side of which least is lost
    height, width = max(p.height, round(sides[0] * scale)), max(p.width, round(sides[1] * scale))
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name} is too elongated: its {sides[1]}×{sides[0]} pixels become {width}×{height}")
    top, left = (height - p.height) // 2, (width - p.width) // 2
    return (height, width), slice(top, top + p.height), slice(left, left + p.width)


def fitted(pixels: Tensor, p: Preprocessing, name: object) -> Tensor:
    """uint8 [H, W, C] → uint8 [height, width, C], resized and cut. Bilinear and bicubic pixels may differ from Pillow's
    by one level of 255: PyTorch's filters are three times as fast.

    Raises:
        ValueError: a picture without pixels, or too elongated to be resized.
    """
    sides = pixels.shape[0], pixels.shape[1]
    (height, width), rows, columns = geometry(sides, p, name)
    if (height, width) != sides:
        if p.interpolation in ("bilinear", "bicubic"):
            planes = pixels.permute(2, 0, 1)[None]
            planes = F.interpolate(planes, (height, width), mode=p.interpolation, antialias=True)
            pixels = planes[0].permute(1, 2, 0)
        else:
            array = pixels.numpy()
            image = Image.fromarray(array[:, :, 0] if p.channels == 1 else array)
            resized = np.array(image.resize((width, height), Image.Resampling[p.interpolation.upper()]))
            pixels = torch.from_numpy(resized.reshape(height, width, p.channels))
    return pixels[rows, columns]


def normalised(pictures: Sequence[Tensor], p: Preprocessing) -> Tensor:
    """uint8 [height, width, C] each → the network's input [N, C, height, width], float32."""
    x = torch.empty(len(pictures), p.channels, p.height, p.width)
    for i, pixels in enumerate(pictures):
        x[i].copy_(pixels.permute(2, 0, 1))
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (p.mean, p.std))
    return x.sub_((255 * mean).float()).mul_((1 / (255 * std)).float())


def load_image(path: str | Path, preprocessing: Preprocessing) -> Tensor:
    """The input for a picture file, [1, C, height, width], float32, as `preprocessing` says.

    Raises:
        OSError: no such file, not an image, a damaged one, or one whose pixels have no known range.
        ValueError: an image too elongated to be resized.
    """
    image = open_image(path, preprocessing.color)
    return normalised([fitted(pixels_of(image, preprocessing), preprocessing, path)], preprocessing)
