"""Image files → network input, as ImageNet models are evaluated: resize, centre crop, normalise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
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


def load_image(path: str | Path, size: int, crop: float, channels: int) -> Tensor:
    """[1, channels, size, size], float32. The shorter side becomes size / crop pixels (bilinear), the centre is taken.

    Three channels are normalised with ImageNet's mean and deviation; one channel is grey in 0…1.

    Raises:
        OSError: no such file, not an image, a damaged one, or one whose pixels have no known range.
        ValueError: for a number of channels other than 1 and 3, or an image too elongated to be resized.
    """
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, the network wants {channels}")
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe would block
        raise OSError(f"{path} is not a file")
    try:
        with Image.open(path) as file:
            narrow = _eight_bits(ImageOps.exif_transpose(file), file.format, path)
            image = narrow.convert("RGB" if channels == 3 else "L")
    except UnidentifiedImageError as error:
        raise OSError(f"{path} is not an image") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no image file {path}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"cannot read the image {path}: {error}") from error
    scale = size / crop / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if width * height > MAX_PIXELS:
        raise ValueError(f"{path} is too elongated: its {image.width}×{image.height} pixels become {width}×{height}")
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    x = torch.from_numpy(pixels.reshape(size, size, channels)).permute(2, 0, 1)[None]
    if channels == 3:
        x = (x - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    return x.contiguous()
