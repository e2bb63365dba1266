"""The one answer to "is it still the same?": whether tensors, and modules, are as they were when something was made of
them. For every cache of packed weights: those of networks (`Watch`) and those of single operators (`state_of`).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import chain
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from parnet_kernels import _native
from parnet_kernels.locks import Lock

_version = operator.attrgetter("_version")
T = TypeVar("T")
#: Of a module: the dictionaries with what its result depends on besides its settings.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DICTS = ("_parameters", "_buffers", "_modules", *HOOKS)


class State(NamedTuple):
    """What tells whether tensors are as they were; holds no tensor."""

    versions: list[int]
    values: int | list[int]  # a fingerprint; or, elsewhere than on the CPU, addresses


def state_of(tensors: list[Tensor]) -> State:
    """Of tensors that are not inference tensors, which have no version counter.

    The version counter tells changes in place. What bypasses it (`weight.data = …`, collectives, `weight.data.mul_(2)`,
    NumPy views) is told on the CPU by a fingerprint of addresses, shapes, all values of vectors and 64 values spread
    over each larger tensor. Elsewhere values cannot be read without waiting for the device: addresses tell
    `weight.data = …`, but for memory that came back to the same place.
    """
    versions = [*map(_version, tensors)]
    if _native.cpu_error is None and tensors and tensors[0].is_cpu:
        try:
            return State(versions, torch.ops.parnet._cpu_fingerprint.default(tensors))
        except NotImplementedError:  # not all of them are on the CPU
            pass
    return State(versions, [*map(Tensor.data_ptr, tensors)])


class Watch:
    """Modules as they are now: classes, number of attributes, some settings, submodules, hooks and tensors. Holds them,
    so that none of them can be mistaken for a later one.

    Asked at every call of a network, when caches hold weights and activations: it touches as little memory as it can.
    """

    def __init__(self, modules: Sequence[nn.Module], settings: Sequence[tuple[str, ...]]) -> None:
        """settings: for each module, names of the attributes that matter; they are compared as objects."""
        self._modules = list(modules)
        self._attributes = [m.__dict__ for m in modules]
        self._classes, self._counts = [*map(type, modules)], [*map(len, self._attributes)]
        self._look = [operator.itemgetter(*_DICTS, *names) for names in settings]
        dicts = [attributes[name] for attributes in self._attributes for name in _DICTS]
        # Most are empty, which is faster asked than their contents.
        self._empty, self._dicts = [d for d in dicts if not d], [d for d in dicts if d]
        self._objects = self._current()
        self.tensors = [t for t in self._objects if isinstance(t, Tensor)]
        self._state = state_of(self.tensors)

    def _current(self) -> list[Any]:
        attributes = map(operator.call, self._look, self._attributes)
        return [*chain.from_iterable(attributes), *chain.from_iterable(map(dict.values, self._dicts))]

    def unchanged(self) -> bool:
        """Whether nothing was replaced, added, removed or changed in place."""
        if any(self._empty) or [*map(type, self._modules)] != self._classes:
            return False
        try:
            objects = self._current()
        except KeyError:  # an attribute was deleted
            return False
        return (
            [*map(len, self._attributes)] == self._counts
            and len(objects) == len(self._objects)
            and all(map(operator.is_, objects, self._objects))
            and state_of(self.tensors) == self._state
        )


class AsMade:
    """A class of layers, as it was when its module was read: whether calls of its modules do what the class then said,
    or someone changed what one call for all layers would not see.
    """

    def __init__(self, cls: type[nn.Module], *methods: str) -> None:
        """methods: of the class, besides those of a call, that a result depends on."""
        self._cls = cls
        self._methods = operator.attrgetter("__call__", "_call_impl", "forward", *methods)
        self._original = self._methods(cls)
        # Attributes of an instance that would hide what its class does.
        self._hiding = {n for n in dir(cls) if callable(getattr(cls, n))} | {"_compiled_call_impl"}

    def why_not_class(self) -> str | None:
        """What was done to all modules, or to this class, that one call for all would ignore; or None."""
        g = nn.modules.module
        if (
            g._global_forward_hooks
            or g._global_forward_pre_hooks
            or g._global_backward_hooks
            or g._global_backward_pre_hooks
        ):
            return "there are global module hooks"
        return None if self._methods(self._cls) == self._original else f"{self._cls.__name__} was patched"

    def why_not(self, m: nn.Module) -> str | None:
        """What was done to this module that one call for all would ignore, or None."""
        if type(m) is not self._cls:
            return f"is a {type(m).__name__}"
        if patched := [name for name in m.__dict__ if name in self._hiding]:
            return f"has another `{patched[0]}`"
        return "has hooks" if any(m.__dict__[name] for name in HOOKS) else None


class Remembered(Generic[T]):
    """A value that was made of modules, as long as they are unchanged. Not copied or pickled: a copy makes its own."""

    def __init__(self) -> None:
        self._known: tuple[Watch, T] | None = None
        self.lock = Lock()  # for who makes the value

    def __reduce__(self) -> tuple[type[Remembered[T]], tuple[()]]:
        return Remembered, ()

    def get(self) -> tuple[Watch, T] | None:
        known = self._known
        return known if known is not None and known[0].unchanged() else None

    def put(self, watch: Watch, value: T) -> tuple[Watch, T]:
        self._known = known = watch, value
        return known

    def forget(self) -> None:
        self._known = None
