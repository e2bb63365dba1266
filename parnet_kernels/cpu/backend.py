"""The CPU backend of the public operators: the native kernels of csrc/cpu, and a cache of packed weights.

The kernels read weights in a transformed layout ("packed", `torch.ops.parnet._cpu_pack`). The public operators take
plain weights, so the packed form is cached per weight tensor (and storage: what a call returns must not depend on the
maps of earlier ones). An entry

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

from parnet_kernels import _native
from parnet_kernels.checks import is_channels_last
from parnet_kernels.locks import Lock
from parnet_kernels.unchanged import State, state_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PARAMETERS = {
    "repvgg_sse": ("weight", "bias", "skip_scale", "skip_shift", "gate_weight", "gate_bias"),
    "downsample_se": ("weight", "bias", "gate_weight", "gate_bias"),
    "fusion_se": ("weight", "bias", "gate_weight", "gate_bias"),
}
_INPUTS = {"repvgg_sse": 1, "downsample_se": 1, "fusion_se": 2}
#: The names that native code knows by number, in the order of the enumerations of csrc/cpu/layer.h.
CODES = {
    "kind": ("repvgg_sse", "downsample_se", "fusion_se"),
    "activation": ("silu", "relu"),
    "storage": ("auto", "wide", "full", "rows", "compact"),
}
OPTIONAL = dict.fromkeys(("gate_bias", "skip_scale", "skip_shift", "out_scale", "out_shift"))

Parameters = dict[str, Tensor | None]


def why_not(op: str, x: Tensor) -> str | None:
    """The reason why the kernels cannot run `op` on x, or None. The arguments are known to agree with each other."""
    if _native.cpu_error:
        return _native.cpu_error
    if x.device.type != "cpu":
        return f"x is on {x.device}"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, not one of {DTYPES}"
    if 0 in x.shape[1:]:
        return f"x has shape {list(x.shape)}"
    return None


def run(op: str, tensors: list[Tensor | None], options: dict[str, Any]) -> Tensor | None:
    """One call of a public operator: `tensors` are its positional arguments, `options` the others.

    None if x, y or a parameter holds NaN or infinity, which the kernels' tiles would spread.
    """
    inputs = 2 if op == "fusion_se" else 1
    x, y = tensors[0], tensors[1] if inputs == 2 else None
    assert x is not None
    parameters: Parameters = dict(zip(_PARAMETERS[op], tensors[inputs:], strict=True))
    parameters["out_scale"], parameters["out_shift"] = options["out_scale"], options["out_shift"]
    stride = options.get("stride", 1)
    storage = storage_of(x.shape[2] * x.shape[3] // stride**2, tensors[inputs])
    packed = packed_weights(op, stride, options["activation"], parameters, storage)
    if packed is None:
        return None
    result = torch.ops.parnet._cpu_layer(x, y, packed, is_channels_last(x))
    return result if result.numel() or not x.numel() else None


def storage_of(outputs: int, weight: Tensor | None) -> str:
    """Of the weights of a layer with maps of `outputs` pixels: "wide" for large maps, with many blocks of tiles (making
    weights from taps for each takes longer there: 6 to 8 % at 320 and 400 channels), unless the weights are very many
    or too many for tiles of 6 × 6 (csrc/cpu/layer.h); else "auto" (csrc/cpu/schedule/pack.h).
    """
    assert weight is not None
    wide = outputs >= 500 and weight.shape[1] <= 512 and weight.numel() <= 12 << 20
    return "wide" if wide else "auto"


def pack_layers(layers: Sequence[dict[str, Any]]) -> tuple[Tensor, list[int]]:
    """Layers, one behind the other in one tensor, and the bytes they start at. Each is given by arguments of
    `_cpu_pack`, with names (`CODES`) instead of numbers.
    """
    layers = [coded(layer) for layer in layers]
    pack = torch.ops.parnet._cpu_pack.default
    measured, ends = torch.empty(0, dtype=torch.uint8, device="cpu"), [0]
    for layer in layers:
        ends.append(pack(measured, ends[-1], **layer))
    packed = torch.ops.parnet._cpu_bytes(ends.pop())
    for start, layer in zip(ends, layers, strict=True):
        pack(packed, start, **layer)
    return packed, ends


def coded(layer: dict[str, Any]) -> dict[str, Any]:
    """`layer` with the numbers of `CODES`."""
    return layer | {name: codes.index(layer[name]) for name, codes in CODES.items()}


def pack(op: str, stride: int, activation: str, parameters: Parameters, storage: str = "auto") -> Tensor:
    """The packed form of one layer; `storage` see `DeployedParNet.prepare`."""
    options = {"kind": op, "stride": stride, "activation": activation, "storage": storage}
    return pack_layers([{**OPTIONAL, **parameters, **options}])[0]


def are_finite(tensors: list[Tensor]) -> bool:
    """Whether none of them holds NaN or infinity; asked once, before packing."""
    return all(bool(t.isfinite().all()) for t in tensors)


# ------------------------------------------------------------------ cache


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


def _key(op: str, tensors: list[Tensor | None], options: dict[str, Any]) -> _Key:
    x, weight, stride = tensors[0], tensors[_INPUTS[op]], options.get("stride", 1)
    assert x is not None
    return op, id(weight), stride, options["activation"], storage_of(x.shape[2] * x.shape[3] // stride**2, weight)


def packed_weights(op: str, stride: int, activation: str, parameters: Parameters, storage: str) -> Tensor | None:
    """The packed form of a layer, from the cache if still that of these parameters; None if they are not finite."""
    weight = parameters["weight"]
    assert weight is not None
    key = (op, id(weight), stride, activation, storage)
    present = [p for p in parameters.values() if p is not None]
    inference = any(p.is_inference() for p in present)
    entry = _entries.get(key)
    objects = [*map(id, parameters.values())]
    if entry is not None and entry.objects == objects:
        if isinstance(entry.state, State):
            if not inference and entry.state == state_of(present):
                return entry.packed
        elif inference and all(torch.equal(a, b) for a, b in zip(entry.state, present, strict=True)):
            return entry.packed
    # State first: an update by another thread while packing must make the entry stale, not hide in it.
    state = [p.clone() for p in present] if inference else state_of(present)
    packed = pack(op, stride, activation, parameters, storage) if are_finite(present) else None
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
    """That this call went through `run` when the backend `asked` was asked for."""
    look, key = _look(asked, op, tensors, options), _key(op, tensors, options)
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
