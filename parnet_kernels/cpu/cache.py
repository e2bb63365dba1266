"""Packed weights of the public operators, kept as long as they are current.

The operators take plain weights, the kernels packed ones (`pack.py`), so these are cached per weight tensor (and
storage: what a call returns must not depend on the maps of earlier ones). An entry

* lives no longer than any of the layer's parameters, and holds no reference to them;
* is used only if every parameter is the same tensor object with the same version counter and the same memory as when it
  was packed, so in-place updates, `load_state_dict`, optimizer steps and `p.data = …` are always seen;
* is also checked against a fingerprint of shapes and values: all of bias, scales and shifts, and 64 values spread over
  each of `weight` and `gate_weight`. So updates that bypass the version counter (`weight.data.mul_(2)`, NumPy views,
  another process) are seen if they change any of these values, as every update of a whole tensor does. An update of
  single weights behind autograd's back may not be seen: call `clear_cache()` after one.

Inference tensors have no version counter: their entry holds a copy of the parameters, compared in full at every call.

A call that went through is remembered with its entry: `again` makes the next one like it without any other check.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parnet_kernels.call import SIGNATURES, Call
from parnet_kernels.checks import is_channels_last
from parnet_kernels.cpu.pack import are_finite, pack, storage_of
from parnet_kernels.locks import Lock
from parnet_kernels.unchanged import State, state_of

_INPUTS = {op: len(signature.maps) for op, signature in SIGNATURES.items()}


class _Entry(NamedTuple):
    references: list[weakref.ref[Tensor]]  # one that dies takes the entry along
    objects: list[int]  # ids of the parameters, of None where one is not given
    state: State | list[Tensor]  # of inference tensors: copies
    packed: Tensor | None  # None: a parameter is not finite
    looks: set[_Look]  # of the calls that it served


_Key = tuple[str, int, int, str, str]
_Look = tuple[Any, ...]
_entries: dict[_Key, _Entry] = {}
_lock = Lock()
_version = operator.attrgetter("_version")


def clear_cache() -> None:
    """Forgets all packed weights of the public operators; the next call of each packs again."""
    with _lock:
        _entries.clear()
        _calls.clear()


def _key(call: Call) -> _Key:
    storage = storage_of(call.x.shape[2] * call.x.shape[3] // call.stride**2, call["weight"])
    return call.op, id(call["weight"]), call.stride, call.activation, storage


def packed_weights(call: Call) -> Tensor | None:
    """The packed form of a layer, from the cache if still that of these parameters; None if they are not finite."""
    key, present = _key(call), call.present
    inference = any(p.is_inference() for p in present)
    entry = _entries.get(key)
    objects = [*map(id, call.parameters.values())]
    if entry is not None and entry.objects == objects:
        if isinstance(entry.state, State):
            if not inference and entry.state == state_of(present):
                return entry.packed
        elif inference and all(torch.equal(a, b) for a, b in zip(entry.state, present, strict=True)):
            return entry.packed
    # State first: an update by another thread while packing must make the entry stale, not hide in it.
    state = [p.clone() for p in present] if inference else state_of(present)
    finite = are_finite(present)
    packed = pack(call.op, call.stride, call.activation, call.parameters, key[-1]) if finite else None
    references = [weakref.ref(p, lambda _: _forget(key)) for p in present]
    with _lock:
        _forget(key)
        _entries[key] = _Entry(references, objects, state, packed, set())
    return packed


def _forget(key: _Key) -> None:
    entry = _entries.pop(key, None)
    for look in [*entry.looks] if entry else ():
        _calls.pop(look, None)


# ------------------------------------------------------------------ repeated calls

MAX_LOOKS = 64  # of one entry

_calls: dict[_Look, tuple[_Entry, bool]] = {}  # the entry that served a call, and whether its result is channels_last


def _look(asked: str | None, op: str, tensors: Sequence[Any], options: dict[str, Any]) -> _Look | None:
    """All that checks, choice of backend and storage depend on, but for devices and the parameters' own properties."""
    inputs, x = _INPUTS[op], tensors[0]
    try:
        of_x = x.shape, x.stride(), x.dtype
        of_y = (tensors[1].shape, tensors[1].stride(), tensors[1].dtype) if inputs == 2 else None
        return asked, op, id(tensors[inputs]), options.get("stride"), options["activation"], of_x, of_y
    except (AttributeError, RuntimeError):  # None, or sparse
        return None


def remember(asked: str | None, op: str, tensors: list[Tensor | None], options: dict[str, Any]) -> None:
    """That this call went through `packed_weights` when the backend `asked` was asked for."""
    look, key = _look(asked, op, tensors, options), _key(Call.of(op, tensors, options))
    with _lock:
        entry = _entries.get(key)
        if look is None or entry is None or entry.packed is None or not isinstance(entry.state, State):
            return
        if len(entry.looks) >= MAX_LOOKS:
            for old in entry.looks:
                _calls.pop(old, None)
            entry.looks.clear()
        entry.looks.add(look)
        _calls[look] = entry, is_channels_last(tensors[0])  # type: ignore[arg-type]
        if _entries.get(key) is not entry:  # forgotten meanwhile
            _calls.pop(look, None)


def again(asked: str | None, op: str, tensors: list[Tensor | None], options: dict[str, Any]) -> Tensor | None:
    """The result, if a call that looks the same went through with the same parameters, unchanged; else None.

    Weights push the interpreter out of the caches at each call: what this does besides the kernel counts.
    """
    known = _calls.get(_look(asked, op, tensors, options))  # type: ignore[arg-type]
    if known is None:
        return None
    entry, channels_last = known
    assert isinstance(entry.state, State)
    inputs = _INPUTS[op]
    given = (*tensors[inputs:], options["out_scale"], options["out_shift"])
    present = [p for p in given if p is not None]
    if [*map(id, given)] != entry.objects or [*map(_version, present)] != entry.state.versions:
        return None
    result: Tensor = torch.ops.parnet._cpu_layer_if_same.default(
        tensors[0], tensors[1] if inputs == 2 else None, entry.packed, channels_last, present, entry.state.values
    )
    return result if result.dim() == 4 else None
