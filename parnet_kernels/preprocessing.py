"""What turns a picture into a network's input, and the names of its classes: said by the network, kept in its files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from parnet_kernels.pretrained import Pretrained

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
#: Pillow's filters, by their names there.
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
#: Channels of each colour order.
COLORS = {"rgb": 3, "bgr": 3, "gray": 1}
MAX_SIZE, MAX_RESIZED = 8192, 16384
MAX_NAME, MAX_TEXT = 4096, 1 << 24  # characters of a class name, of a description in a file


def _is_number(value: object, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes an input [1, C, height, width]. It is resized, keeping its shape, until it just covers
    height / crop by width / crop pixels: for a square its shorter side becomes size / crop. Then the centre is cut out,
    and pixel values in 0…1 become (value − mean) / std. The default is that of ImageNet models.

    Attributes:
        size: what the network sees, in pixels: the side of a square, or (height, width), each at most 8192. A pair of
            equal numbers becomes the one number.
        crop: the share of the resized picture's height or width that is cut out, in 0.01…1; the other share is smaller
            where picture and input differ in shape.
        interpolation: the resizing filter: "nearest", "box", "bilinear", "hamming", "bicubic" or "lanczos".
        mean: for each channel of the network, in its colour order.
        std: as `mean`, > 0.
        color: the order of the channels: "rgb", "bgr" or "gray".

    Raises:
        ValueError: for other values.
    """

    size: int | tuple[int, int] = 224
    crop: float = 0.875
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    color: str = "rgb"

    def __post_init__(self) -> None:
        for name in ("size", "mean", "std"):
            if isinstance(getattr(self, name), list):  # as JSON has it
                object.__setattr__(self, name, tuple(getattr(self, name)))

        def require(condition: bool, argument: str, requirement: str) -> None:
            if not condition:
                raise ValueError(f"Preprocessing: `{argument}` must {requirement}, got {getattr(self, argument)!r}")

        sides = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        whole = len(sides) == 2 and all(isinstance(side, int) and _is_number(side, 1, MAX_SIZE) for side in sides)
        require(whole, "size", f"be an integer in 1…{MAX_SIZE}, or two of them, (height, width)")
        object.__setattr__(self, "size", sides[0] if sides[0] == sides[1] else (sides[0], sides[1]))
        require(_is_number(self.crop, 0.01, 1), "crop", "be a number in 0.01…1")
        fits = max(sides) / self.crop <= MAX_RESIZED
        require(fits, "crop", f"leave size / crop ≤ {MAX_RESIZED} (size {self._size()})")
        require(self.interpolation in INTERPOLATIONS, "interpolation", f"be one of {', '.join(INTERPOLATIONS)}")
        require(isinstance(self.color, str) and self.color in COLORS, "color", f"be one of {', '.join(COLORS)}")
        for name, least in (("mean", -1e6), ("std", 1e-6)):
            values = getattr(self, name)
            fits = isinstance(values, tuple) and len(values) == self.channels
            requirement = f"be {self.channels} numbers in {least:g}…1e+06 for colour order {self.color}"
            require(fits and all(_is_number(v, least, 1e6) for v in values), name, requirement)

    @property
    def channels(self) -> int:
        """Of the network's input."""
        return COLORS[self.color]

    @property
    def height(self) -> int:
        """Of the network's input."""
        return self.size[0] if isinstance(self.size, tuple) else self.size

    @property
    def width(self) -> int:
        """Of the network's input."""
        return self.size[1] if isinstance(self.size, tuple) else self.size

    @classmethod
    def assumed(cls, channels: int) -> Preprocessing:
        """What is assumed of a network that says nothing: ImageNet's for 3 channels, values in 0…1 for 1 channel.

        Raises:
            ValueError: for another number of channels: pictures have 1 or 3.
        """
        if channels == 3:
            return cls()
        if channels == 1:
            return cls(mean=(0.0,), std=(1.0,), color="gray")
        raise ValueError(f"pictures have 1 or 3 channels, the network takes {channels}")

    def replace(self, **changes: Any) -> Preprocessing:
        """A copy with other fields."""
        return dataclasses.replace(self, **changes)

    def _size(self) -> str:
        return f"{self.height}x{self.width}" if isinstance(self.size, tuple) else str(self.size)

    def __str__(self) -> str:
        mean, std = (", ".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        return f"size {self._size()}, crop {self.crop:g}, {self.interpolation}, mean {mean}, std {std}, {self.color}"


class Described(Pretrained, nn.Module):
    """A network that can say what its input and outputs mean. Both parts are kept by `deploy`, `save` and the loading
    functions; None where nobody has said it.
    """

    _preprocessing: Preprocessing | None = None
    _class_names: tuple[str, ...] | None = None
    __jit_unused_properties__ = ("preprocessing", "class_names")
    config: Any

    def __init__(self) -> None:
        super().__init__()
        self._preprocessing = None
        self._class_names = None

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How a picture becomes an input."""
        return self._preprocessing

    @preprocessing.setter
    def preprocessing(self, value: Preprocessing | None) -> None:
        if not isinstance(value, Preprocessing | None):
            raise TypeError(f"`preprocessing` must be a Preprocessing or None, got a {type(value).__name__}")
        if value is not None and value.channels != self.config.in_chans:
            raise ValueError(
                f"`preprocessing` must make {self.config.in_chans} channels, as the network takes, "
                f"got colour order {value.color}"
            )
        self._preprocessing = value

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """One a class."""
        return self._class_names

    @class_names.setter
    def class_names(self, names: Iterable[str] | None) -> None:
        if names is not None:
            made = (names,) if isinstance(names, str) else tuple(names)
            if isinstance(names, str) or not all(isinstance(name, str) for name in made):
                raise TypeError(f"`class_names` must be strings, one a class, got {str(names)[:100]!r}")
            if len(made) != self.config.num_classes:
                raise ValueError(f"`class_names` must be {self.config.num_classes}, one a class, got {len(made)}")
            if any(len(name) > MAX_NAME for name in made):
                raise ValueError(f"`class_names` must have at most {MAX_NAME} characters each")
            names = made
        self._class_names = names

    def described_as(self, other: Any) -> Self:
        """This network, saying what the network `other` says that fits its channels and number of classes."""
        if other.config.in_chans == self.config.in_chans:
            self.preprocessing = other.preprocessing
        if other.config.num_classes == self.config.num_classes:
            self.class_names = other.class_names
        return self

    def description(self) -> dict[str, str]:
        """What the network says, as text for a file: metadata of safetensors, entries beside a `state_dict`."""
        said = {}
        if self.preprocessing is not None:
            said["parnet_preprocessing"] = json.dumps(dataclasses.asdict(self.preprocessing))
        if self.class_names is not None:
            said["parnet_class_names"] = json.dumps(self.class_names)
        return said

    def describe(self, said: Mapping[str, Any]) -> Self:
        """This network, saying what `description` gave.

        Raises:
            ValueError: an entry is something else, or does not fit the network.
        """
        for key, kind in (("parnet_preprocessing", dict), ("parnet_class_names", list)):
            text = said.get(key)
            if text is None:
                continue
            try:
                if not isinstance(text, str) or len(text) > MAX_TEXT:
                    raise TypeError(f"not a text of at most {MAX_TEXT} characters")
                value: Any = json.loads(text)
                if type(value) is not kind:
                    raise TypeError(f"a {type(value).__name__}")
                if kind is dict:
                    self.preprocessing = Preprocessing(**dict(value))
                else:
                    self.class_names = value
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(
                    f"`{key}` must be JSON as `description` gives it, got {str(text)[:100]!r}: {error}"
                ) from error
        return self
