"""Frames and pictures → class names with probabilities, or features."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from parnet_kernels.app.frames import grey, prepared
from parnet_kernels.app.images import fitted, normalised, open_image, pixels_of, upright
from parnet_kernels.checkpoint import load_network
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.model import ParNet
from parnet_kernels.preprocessing import Described, Preprocessing
from parnet_kernels.quantized import QuantizedParNet


class Guess(NamedTuple):
    """A class, and the probability that the network gives it."""

    label: str
    probability: float
    id: int


class Classifier:
    """A network with its preprocessing and class names, for pictures as they come: uint8 frames [H, W, 3] (also [H, W],
    one channel or four, the last ignored) as NumPy arrays or tensors, Pillow's images, paths, and lists of these.

    Args:
        network: a file (see `load_network`), a ParNet, a DeployedParNet or a QuantizedParNet.
        preprocessing: instead of that of the network. A network without any is taken to be as
            `Preprocessing.assumed` says, with a warning.
        class_names: instead of those of the network; without any, numbers are the labels.
        frame_color: the order of the channels of frames, "rgb" or "bgr" (OpenCV's). Images and files say it themselves.

    It may be called from several threads. Frames are read where they are: one pass resizes them, one writes the input.
    Tensors on a GPU become inputs there, by "bilinear" or "bicubic", on its current stream, without a copy to the host;
    from another device than the network's they are moved as pixels. A tensor [N, H, W, C] is resized in one go.

    Raises:
        FileNotFoundError, CheckpointError: as `load_network`.
        TypeError, ValueError: for another argument; also a network without 1 or 3 channels.
    """

    def __init__(
        self,
        network: str | Path | ParNet | DeployedParNet | QuantizedParNet,
        *,
        preprocessing: Preprocessing | None = None,
        class_names: Sequence[str] | None = None,
        frame_color: str = "rgb",
    ) -> None:
        if frame_color not in ("rgb", "bgr"):
            raise ValueError(f"Classifier: `frame_color` must be 'rgb' or 'bgr', got {frame_color!r}")
        if isinstance(network, str | Path):
            network = load_network(network)
        elif isinstance(network, ParNet):
            network = network.deploy()
        if not isinstance(network, DeployedParNet | QuantizedParNet):
            raise TypeError(f"Classifier: `network` must be a path or a network, got a {type(network).__name__}")
        said = Described()  # what is asked for here is checked as a network checks it, and the network left as it is
        said.config = network.config
        said.described_as(network)
        if class_names is not None:
            said.class_names = tuple(class_names)
        if preprocessing is not None:
            said.preprocessing = preprocessing
        if said.preprocessing is None:
            said.preprocessing = Preprocessing.assumed(network.config.in_chans)
            text = f"Classifier: the network does not say its preprocessing; assumed: {said.preprocessing}"
            warnings.warn(text, stacklevel=2)
        self.network: DeployedParNet | QuantizedParNet = network.prepare()
        self.preprocessing = said.preprocessing
        self.class_names = said.class_names or tuple(map(str, range(network.num_classes)))
        self._frame_color = frame_color

    def __call__(self, pictures: Any, top: int = 5) -> list[Guess] | list[list[Guess]]:
        """The `top` most probable classes, the first the most; of a list (or a tensor or array [N, H, W, C]) a list.

        Raises:
            OSError: a file cannot be read.
            TypeError: something is no picture.
            ValueError: the network has no classifier, `top` is no positive integer, a picture has no pixels or is too
                elongated, or on a device that does not have its filter, or the network's outputs for it are not finite.
        """
        if not self.network.num_classes:
            raise ValueError("Classifier: the network has no classifier: `features` gives what it has")
        if not isinstance(top, int) or top < 1:
            raise ValueError(f"Classifier: `top` must be an integer ≥ 1, got {top!r}")
        with torch.inference_mode():
            logits = self.network(self.inputs(pictures)).float()
            finite = logits.isfinite().all(1).tolist()
            if not all(finite):
                raise ValueError(f"Classifier: picture {finite.index(False)}: the network's outputs are not finite")
            scores, classes = logits.softmax(1).topk(min(top, logits.shape[1]), 1)
        found = [
            [Guess(self.class_names[i], p, i) for i, p in zip(row, probabilities, strict=True)]
            for row, probabilities in zip(classes.tolist(), scores.tolist(), strict=True)
        ]
        return found if _is_many(pictures) else found[0]

    def features(self, pictures: Any) -> Tensor:
        """What the classifier's last layer sees: [num_features]; of a list [N, num_features]. Errors as of a call."""
        with torch.inference_mode():
            last_map = self.network.forward_features(self.inputs(pictures))
            found = self.network.forward_head(last_map, pre_logits=True)
        return found if _is_many(pictures) else found[0]

    def inputs(self, pictures: Any) -> Tensor:
        """The network's input [N, C, height, width] for pictures, in its dtype, on its device. Errors as of a call."""
        p, head = self.preprocessing, self.network.head_weight
        if isinstance(pictures, Tensor):
            pictures = self._placed(pictures, 0)
        many = _is_many(pictures)
        together = many and isinstance(pictures, Tensor) and not pictures.is_cpu
        made: list[Tensor] = []  # uint8 [height, width, C] on the host, float32 [N, C, height, width] on a device
        for i, picture in enumerate(pictures if many and not together else [pictures]):
            pixels = self._pixels(picture, i, together)
            if pixels.is_cpu:
                made.append(fitted(pixels, p, f"picture {i}"))
            else:
                made.append(prepared(pixels if together else pixels[None], p, f"picture {i}"))
        if all(x.dtype == torch.uint8 for x in made):
            return normalised(made, p).to(head.device, head.dtype)
        made = [normalised([x], p) if x.dtype == torch.uint8 else x for x in made]
        parts = [x.to(head.device, head.dtype) for x in made]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def warmup(self, batch: int = 1) -> Classifier:
        """Does once, for lists of `batch` pictures, what else the first call does: memory and a plan for that size."""
        p = self.preprocessing
        with torch.inference_mode():
            head = self.network.head_weight
            self.network(torch.zeros(batch, p.channels, p.height, p.width, dtype=head.dtype, device=head.device))
        return self

    def _placed(self, frame: Tensor, i: int) -> Tensor:
        """The frame where it becomes an input: on the host, if it is there; else on the network's device."""
        if frame.device.type == "meta":
            raise TypeError(f"Classifier: picture {i} must have pixels, a tensor on meta has none")
        return frame.detach() if frame.is_cpu else frame.detach().to(self.network.head_weight.device)

    def _pixels(self, picture: Any, i: int, many: bool = False) -> Tensor:
        """uint8 [H, W, C] in the network's order of channels; if `many`, [N, H, W, C] of [N, H, W, …]."""
        p = self.preprocessing
        if isinstance(picture, str | Path):
            return pixels_of(open_image(picture, p.color), p)
        if isinstance(picture, Image.Image):
            return pixels_of(upright(picture, p.color, f"picture {i}"), p)
        if not isinstance(picture, np.ndarray | Tensor):
            raise TypeError(
                f"Classifier: picture {i} must be an array, an image or a path, got {type(picture).__name__}"
            )
        shape, kind = tuple(picture.shape[int(many) :]), str(picture.dtype).removeprefix("torch.")
        if kind != "uint8" or len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3, 4)):
            hint = ": it looks channels-first" if len(shape) == 3 and shape[0] in (1, 3) else ""
            raise TypeError(f"Classifier: picture {i} must be uint8 [H, W, 3], got {kind} {list(shape)}{hint}")
        if isinstance(picture, Tensor):
            pixels = self._placed(picture, i)
        else:  # no tensor has negative strides or is read-only
            plain = picture.flags.writeable and min(picture.strides) >= 0
            pixels = torch.from_numpy(picture if plain else picture.copy())
        pixels = pixels[..., None] if len(shape) == 2 else pixels[..., :3]
        if pixels.shape[-1] == 3 and (p.channels == 1 or self._frame_color != p.color):
            if self._frame_color != "rgb" or p.color == "bgr":
                pixels = pixels.flip(-1)
            if p.channels == 1 and not pixels.is_cpu:
                return grey(pixels)
            if p.channels == 1:  # Pillow's weights of the colours, as in files
                return pixels_of(Image.fromarray(pixels.contiguous().numpy()).convert("L"), p)
            return pixels
        return pixels.expand(*pixels.shape[:-1], p.channels)


def _is_many(pictures: Any) -> bool:
    if isinstance(pictures, np.ndarray | Tensor):
        return pictures.ndim == 4
    return isinstance(pictures, Sequence) and not isinstance(pictures, str)
