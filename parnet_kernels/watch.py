"""Whether the buffers that packed weights were made of are still the same."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import chain

from torch import Tensor, nn

_version = operator.attrgetter("_version")


class Watch:
    """The buffers of `modules` as they are now. Holds them, so that none of them can be mistaken for a later one.

    Asked at every call of a network, when caches hold weights and activations: it touches as little memory as it can.
    What bypasses autograd's version counter (`weight.data.mul_(2)`, NumPy views) is not seen.
    """

    @classmethod
    def of(cls, modules: Sequence[nn.Module], device_type: str) -> Watch | None:
        """None if some buffers are on other devices, or inference tensors, whose changes cannot be seen."""
        buffers = (b for module in modules for b in module._buffers.values() if b is not None)
        if any(b.is_inference() or b.device.type != device_type for b in buffers):
            return None
        return cls(modules)

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)
        self._dicts = [module._buffers for module in modules]
        self._buffers = [*chain.from_iterable(map(dict.values, self._dicts))]
        self._tensors: list[Tensor] = [b for b in self._buffers if b is not None]
        self._versions = [*map(_version, self._tensors)]
        self._addresses = [*map(Tensor.data_ptr, self._tensors)]  # `weight.data = …` keeps the version

    def unchanged(self, modules: Sequence[nn.Module]) -> bool:
        """Whether `modules` are the same ones, and no buffer was replaced, added, removed or changed in place."""
        buffers = [*chain.from_iterable(map(dict.values, self._dicts))]
        return (
            len(modules) == len(self._modules)
            and all(map(operator.is_, modules, self._modules))
            and len(buffers) == len(self._buffers)
            and all(map(operator.is_, buffers, self._buffers))
            and [*map(_version, self._tensors)] == self._versions
            and [*map(Tensor.data_ptr, self._tensors)] == self._addresses
        )
