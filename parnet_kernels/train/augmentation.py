"""Pictures → inputs of the network. For training with augmentation by torchvision's transforms v2 where it imports;
else by kornia, which is written in PyTorch alone and so works beside every version of it: torchvision's compiled part
needs the very torch that it was built for. Both draw from PyTorch's global generator, in the order of the transforms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from parnet_kernels.app.images import fitted, pixels_of
from parnet_kernels.preprocessing import Preprocessing
from parnet_kernels.train.settings import Settings

Transform = Callable[[Tensor], Tensor]  # [C, H, W], values in 0…1 → the same with other H, W


def library() -> str:
    """ "torchvision" or "kornia".

    Raises:
        ImportError: neither imports; the text says why.
    """
    try:
        from torchvision.transforms import v2  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:  # built for another torch
        reason = f"torchvision does not import ({error})"
    else:
        return "torchvision"
    try:
        import kornia.augmentation  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        raise ImportError(f"{reason}, nor kornia ({error})") from error
    return "kornia"


class Augmentation:
    """A training picture → an input of the network, at random."""

    def __init__(self, s: Settings, preprocessing: Preprocessing) -> None:
        p = self._preprocessing = preprocessing
        self._opened = p.replace(color="rgb") if p.color == "bgr" else p  # RandAugment knows colours by their place
        self._geometry, self._colours, self._erase = _by_torchvision(s) if library() == "torchvision" else _by_kornia(s)
        self._fit = not s.crop_scale
        self._mean, self._std = (torch.tensor(values)[:, None, None] for values in (p.mean, p.std))

    def __call__(self, image: Image.Image, name: object) -> Tensor:
        """Of an `upright` picture: [C, size, size], float32.

        Raises:
            ValueError: a picture without pixels, or too elongated to be resized.
        """
        pixels = pixels_of(image, self._opened)
        if self._fit or 0 in pixels.shape:
            pixels = fitted(pixels, self._opened, name)
        x = self._geometry(pixels.permute(2, 0, 1).float().div_(255))
        if self._colours is not None:  # for grey pictures: of three equal channels, one
            x = self._colours(x.expand(3, -1, -1))[: self._preprocessing.channels]
        x = x.flip(0) if self._preprocessing.color == "bgr" else x
        return self._erase((x - self._mean) / self._std)


def _by_torchvision(s: Settings) -> tuple[Transform, Transform | None, Transform]:
    """Random crop and flip; RandAugment; random erasing (by random values) after normalisation."""
    from torchvision.transforms import v2

    steps: list[Any] = []
    if s.crop_scale:
        steps.append(v2.RandomResizedCrop((s.size, s.size), (s.crop_scale, 1.0), antialias=True))
    elif s.pad:
        steps.append(v2.RandomCrop((s.size, s.size), padding=s.pad))
    steps.append(v2.RandomHorizontalFlip(s.flip))
    augment: Any = v2.RandAugment(2, s.randaugment) if s.randaugment else None
    erase: Any = v2.RandomErasing(s.erase, value="random")
    return (
        v2.Compose(steps),
        None if augment is None else lambda x: augment((x * 255).round().to(torch.uint8)).float() / 255,
        erase,
    )


def _by_kornia(s: Settings) -> tuple[Transform, Transform | None, Transform]:
    """As `_by_torchvision`, but erasing by the mean of all pictures."""
    import kornia.augmentation as kornia
    from kornia.augmentation.auto import RandAugment

    steps: list[Any] = []
    if s.crop_scale:
        steps.append(kornia.RandomResizedCrop((s.size, s.size), (s.crop_scale, 1.0)))
    elif s.pad:
        steps.append(kornia.RandomCrop((s.size, s.size), padding=s.pad))
    if s.flip:
        steps.append(kornia.RandomHorizontalFlip(p=s.flip))
    augment: Any = RandAugment(2, s.randaugment) if s.randaugment else None
    erase: Any = kornia.RandomErasing(p=s.erase) if s.erase else None

    def geometry(x: Tensor) -> Tensor:
        x = x[None]
        for step in steps:
            x = step(x)
        return x[0].clamp(0, 1)

    return (
        geometry,
        None if augment is None else lambda x: augment(x[None])[0].clamp(0, 1),
        (lambda x: x) if erase is None else lambda x: erase(x[None])[0],
    )
