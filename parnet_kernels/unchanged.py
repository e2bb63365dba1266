"""Whether the buffers that packed weights were made of are still the same."""

from __future__ import annotations

import operator
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from parnet_kernels import _native

if TYPE_CHECKING:
    from parnet_kernels.deployed import DeployedParNet

_version = operator.attrgetter("_version")


class Watch:
    """The buffers of a network as they are now. Holds them, so that none of them can be mistaken for a later one.

    Asked at every call of the network, when caches hold weights and activations: it touches as little memory as it can.
    Objects and version counters tell most changes. Those that bypass the counter (`weight.data = …`, collectives, NumPy
    views) are told by addresses and, on the CPU, by a fingerprint: all values of vectors, 64 of each larger tensor.
    """

    @classmethod
    def of(cls, network: DeployedParNet, device_type: str) -> Watch | None:
        """None if some buffers are on other devices, or inference tensors, whose changes cannot be seen."""
        if any(b.is_inference() or b.device.type != device_type for b in network.buffers()):
            return None
        return cls(network)

    def __init__(self, network: DeployedParNet) -> None:
        modules = [network, *network.layers.values()]
        # What can be replaced: the layers as a whole, each of them, and their buffers.
        self._dicts: list[dict[str, Any]] = [network._modules, network.layers._modules, *(m._buffers for m in modules)]
        self._objects = self._current()
        self._tensors = [b for b in self._objects if isinstance(b, Tensor)]
        self._versions = [*map(_version, self._tensors)]
        self._values = self._current_values()

    def _current(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self._dicts))]

    def _current_values(self) -> list[int]:
        if _native.cpu_error is None and all(t.is_cpu for t in self._tensors):
            return [torch.ops.parnet._cpu_fingerprint.default(self._tensors)]
        return [*map(Tensor.data_ptr, self._tensors)]

    def unchanged(self) -> bool:
        """Whether no layer or buffer was replaced, added, removed or changed in place."""
        objects = self._current()
        return (
            len(objects) == len(self._objects)
            and all(map(operator.is_, objects, self._objects))
            and [*map(_version, self._tensors)] == self._versions
            and self._current_values() == self._values
        )
