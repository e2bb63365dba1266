"""What the ranks must agree in, at their first meeting and at every call; and what is wrong with one of them alone."""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import torch
from torch import Tensor

from parnet_kernels import _native, selection
from parnet_kernels._version import __version__
from parnet_kernels.distributed.pieces import Packet, Pieces, Wire


class Agreement:
    """Of this rank with the others. source: the rank that sends the images, or None."""

    def __init__(self, pieces: Pieces, source: int | None) -> None:
        self._pieces, self._network, self._source = pieces, pieces.network, source
        self._digest: tuple[object, str] | None = None

    def hello(self) -> dict[str, object]:
        """What the bits of results depend on."""
        network = self._network
        return {
            "version of parnet_kernels": __version__,
            "version of torch": torch.__version__,
            "instruction set of the CPU kernels": _native.cpu_error or str(_native.cpu_info()),
            "configuration": repr(network.config),
            "dtype": str(network.head_weight.dtype),
            "kind of device": network.head_weight.device.type,
            "storage of packed weights": network._native.storage,
            "backend": selection.forced_backend() or "chosen by itself",
            "weights (SHA-256)": self.weights(),
        }

    def why_not(self, x: Any, grad: bool) -> str | None:
        """What is wrong with this rank's images or network, or None."""
        with torch.set_grad_enabled(grad):
            if reason := self._pieces.why_not():
                return f"has a network that cannot be cut into streams: {reason}"
        if x is None:
            return "has no images: `x` is None"
        try:
            self._network._check(x)
        except (TypeError, ValueError) as error:
            return f"has wrong images: {str(error).removeprefix('parnet_kernels: ')}"
        if type(x) is not Tensor or x.dim() != 4 or 0 in x.shape[1:] or x.layout is not torch.strided:
            got = f"{list(x.shape)}, {x.layout}" if isinstance(x, Tensor) else type(x).__name__
            return f"has wrong images: `x` must be a dense tensor [N, {self._network.config.in_chans}, H, W], got {got}"
        if x.device != self._network.head_weight.device or x.dtype != self._network.head_weight.dtype:
            return f"has wrong images: `x` is {x.dtype} on {x.device}, unlike the network"
        if grad and x.requires_grad:
            return "has images that need a gradient: streams on several ranks have none"
        if torch.is_autocast_enabled(x.device.type):
            return "has autocast on: convert the network and the images instead"
        return None

    def about(self, x: Tensor, wire: Wire, result: str) -> dict[str, Any]:
        """What must be the same on all ranks at a call, by name."""
        return {
            "shape of the images": [*x.shape],
            "dtype of the images": str(x.dtype),
            "layout of the images": [wire.channels_last, self._source is not None or adjacent(x)],
            "content of the images (CRC-32)": _crc(x) if self._source is None else 0,
            "kind of result": result,
            "weights (SHA-256)": self.weights(),
            "way to run layers": "native kernels" if wire.native else "layer by layer",
        }

    def weights(self) -> str:
        """A digest of all weights, made again after they changed."""
        whole = self._network.whole()
        if self._digest is None or self._digest[0] is not whole or isinstance(whole, str):
            digest = hashlib.sha256()
            for name, t in sorted(self._network.state_dict().items()):
                digest.update(f"{name} {t.dtype} {[*t.shape]}".encode())
                digest.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
            self._digest = whole, digest.hexdigest()[:16]
        return self._digest[1]


def flat(t: Tensor, channels_last: bool) -> Tensor:
    """A contiguous copy of the values in order of memory, for sending."""
    ordered = t.permute(0, 2, 3, 1) if channels_last else t
    return ordered.contiguous().clone().view(-1)


def adjacent(x: Tensor) -> bool:
    """Whether the channels of a pixel lie together: the order in which the kernels add up an image depends on it."""
    return x.stride(1) == 1 or x.shape[2] * x.shape[3] == 1


def packet_of(x: Tensor) -> Packet:
    """A dense copy of images."""
    packet = Wire(False, x.dtype, adjacent(x), x.device).packet(tuple(x.shape))
    packet.map.copy_(x)
    return packet


def _crc(x: Tensor) -> int:
    """Of images on the CPU; elsewhere reading them would wait for the device."""
    if not x.is_cpu:
        return 0
    ordered = x.permute(0, 2, 3, 1) if adjacent(x) else x
    return zlib.crc32(ordered.contiguous().view(-1).view(torch.uint8).numpy().data)
