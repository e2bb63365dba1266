"""Frames in a GPU's memory → network input, made there: the steps of `images`, in operators that any device has."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from parnet_kernels.app.images import geometry
from parnet_kernels.preprocessing import Preprocessing

#: Pillow's filters that PyTorch has on every device. It has no "hamming" and "lanczos"; its "nearest-exact" takes other
#: pixels than "nearest" at many sizes, and its "area" is "box" only where pixels divide evenly.
FILTERS = ("bilinear", "bicubic")


def grey(pixels: Tensor) -> Tensor:
    """uint8 [..., 3], red first → uint8 [..., 1], in Pillow's integers: the bits that a file's picture has."""
    red, green, blue = pixels.int().unbind(-1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16).to(torch.uint8)[..., None]


def prepared(frames: Tensor, p: Preprocessing, name: object) -> Tensor:
    """uint8 [N, H, W, C], channels in the network's order → the network's input [N, C, height, width], float32.

    All is done on the device of `frames` and its current stream; nothing is copied to or from the host, which does not
    wait. Resized levels differ from those of `images.fitted` by one of 255 in few pixels, hardly ever by two: sums are
    of floats, there of integers.

    Raises:
        ValueError: frames without pixels, or too elongated to be resized, or a filter that PyTorch does not have there.
        RuntimeError: PyTorch's CUDA filter has no memory for the scale: reduced more than 184 times, bicubic 92 times.
    """
    sides = frames.shape[1], frames.shape[2]
    (height, width), rows, columns = geometry(sides, p, name)
    x = frames.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    if (height, width) != sides:
        if p.interpolation not in FILTERS:
            raise ValueError(
                f"{name} is on {frames.device}, where `interpolation` must be one of {', '.join(FILTERS)}, got "
                f"{p.interpolation}, which PyTorch has for no device as Pillow does it: move the picture to the CPU"
            )
        # As Pillow: rows first, and levels between 0 and 255 after each pass. What is cut off is left out early.
        x = _resized(x, (sides[0], width), p.interpolation)[:, :, :, columns]
        x = _resized(x, (height, p.width), p.interpolation)[:, :, rows]
    else:
        x = x[:, :, rows, columns]
    x = x.contiguous()
    for plane, mean, std in zip(x.unbind(1), p.mean, p.std, strict=True):
        plane.sub_(255 * mean).mul_(1 / (255 * std))  # numbers are arguments; tensors of them would be copied there
    return x


def _resized(x: Tensor, sides: tuple[int, int], interpolation: str) -> Tensor:
    """Levels [N, C, H, W] → levels [N, C, *sides], of which one is as before."""
    if 0 in x.shape or sides == (x.shape[2], x.shape[3]):
        return x.new_empty(*x.shape[:2], *sides) if 0 in x.shape else x
    return F.interpolate(x, sides, mode=interpolation, antialias=True).add_(0.5).floor_().clamp_(0, 255)
