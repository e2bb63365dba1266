"""The CUDA backend of the public operators: hand-written kernels (csrc/cuda) for low latency, batches of 1 to 8.

A call is two or three launches: the input to the kernels' layout with its channel sums, then the layer; whole networks
(`network.py`) need the first for no layer but one. Packed weights are cached per weight tensor as long as every
parameter is the same tensor object, at the same address, with the same version counter; updates that bypass the counter
(`weight.data.mul_(2)`) are not seen: call `clear_cache()` after one. Parameters that require gradients, and inference
tensors, are never cached: such calls are better elsewhere (`better_elsewhere`).
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parnet_kernels import _native, verdict
from parnet_kernels.call import Call
from parnet_kernels.checks import is_channels_last
from parnet_kernels.cuda.pack import Layout, PackedLayer, chunk_channels, pack
from parnet_kernels.cuda.plan import Gpu, policy
from parnet_kernels.cuda.program import math_of, play
from parnet_kernels.cuda.record import RESULT, WORKSPACE, Recorder, Step
from parnet_kernels.cuda.workspace import Packed, capturing, workspace
from parnet_kernels.locks import Lock
from parnet_kernels.precision import current_precision
from parnet_kernels.unchanged import State, state_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST = (8, 0)
_disabled: str | None = None


def disable(reason: str | None) -> None:
    """Turns the backend off for this process (None: on again)."""
    global _disabled
    _disabled = reason


@functools.cache
def device_missing(index: int) -> str | None:
    """The reason why the kernels cannot run on cuda:index, or None."""
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        return f"needs compute capability 8.0, cuda:{index} has {capability[0]}.{capability[1]}"
    try:
        torch.ops.parnet._cuda_image(index)
    except RuntimeError as error:  # of this library's CUDA runtime: no image for the device, or the driver is too old
        return str(error).splitlines()[0]
    return None


def tensor_missing(x: Tensor) -> str | None:
    """The reason why the kernels cannot take maps like x, or None."""
    if _native.cuda_error:
        return _native.cuda_error
    if _disabled:
        return _disabled
    if x.device.type != "cuda":
        return f"x is on {x.device}"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, not one of {DTYPES}"
    if 0 in x.shape:
        return f"x has shape {list(x.shape)}"
    limit = policy(80).max_batch
    if x.shape[0] > limit:
        return f"made for latency: batches of 1 to {limit}, got {x.shape[0]}"
    size = chunk_channels(x.dtype)
    pixels, pitch = x.shape[2] * x.shape[3], -(-x.shape[1] // size) * size
    if max(pixels * pitch, x.shape[0] * pixels) >= 2**31:
        return f"an image has {pixels} pixels of {pitch} channels, 2³¹ or more numbers"
    index = x.device.index or 0
    return device_missing(index) or verdict.failure("cuda", index)


def why_not(op: str, x: Tensor) -> str | None:
    """The reason why the kernels cannot run `op` on x, or None. Arguments are already checked against each other."""
    if reason := tensor_missing(x):
        return reason
    if x.requires_grad:
        return "x requires a gradient: Triton computes forward and backward"
    return None


def _cacheable(call: Call) -> bool:
    return not any(p.requires_grad or p.is_inference() for p in call.present)


def better_elsewhere(call: Call) -> str | None:
    """Why a backend that takes plain weights should run the call if it can, or None."""
    return None if _cacheable(call) else "parameters require gradients or are inference tensors: packed at each call"


def run(call: Call) -> Tensor:
    """One call of a public operator."""
    x = call.x
    precision = "tf32" if current_precision() == "tf32" else "ieee"
    packed, shared = _cached(call, precision)
    recorded = _record(
        call.op,
        tuple((tuple(m.shape), m.stride(), m.data_ptr() % 16 == 0) for m in call.maps),
        x.dtype,
        precision,
        Gpu.of(x.device),
        _Geometry(*packed[4:]),
    )
    result = torch.empty(recorded.shape, dtype=x.dtype, device=x.device)
    with workspace(x.device, recorded.workspace_bytes) as memory:
        play([memory, result, *call.maps, *packed[:4]], recorded.program)
    if shared is not None:
        shared.read(x.device)
    y = result.permute(0, 3, 1, 2)
    return y if is_channels_last(x) else y.contiguous()


# ------------------------------------------------------------------ programs of single layers


class _Geometry(NamedTuple):
    """A PackedLayer without its tensors."""

    masked: bool
    kind: str
    stride: int
    activation: str
    in_channels: int
    out_channels: int
    groups: int
    column_tiles: int
    chunks: int


class Recorded(NamedTuple):
    program: Tensor
    workspace_bytes: int
    shape: tuple[int, ...]  # of the result, in memory


@functools.lru_cache(maxsize=512)
def _record(
    op: str,
    inputs: tuple[tuple[tuple[int, ...], tuple[int, ...], bool], ...],  # shape, stride, at a multiple of 16 bytes
    dtype: torch.dtype,
    precision: str,
    gpu: Gpu,
    geometry: _Geometry,
) -> Recorded:
    recorder = Recorder(math_of(dtype, precision), dtype, gpu, len(inputs))
    maps = tuple(
        recorder.enter(shape, stride, RESULT + 1 + i, recorder.step, aligned)
        for i, (shape, stride, aligned) in enumerate(inputs)
    )
    empty = torch.empty(0, device="cpu")
    packed = PackedLayer(empty, empty, empty, empty, *geometry)
    step = Step(packed, recorder.first_packed, maps, f"{op} {list(inputs[0][0])} -> {geometry.out_channels} channels")
    (result,) = recorder.level([step])
    shape = (result.n, result.h, result.w, result.layout.pitch)
    return Recorded(recorder.program.tensor(), recorder.workspace_bytes, shape)


assert WORKSPACE == 0  # the order of `run`'s buffers


# ------------------------------------------------------------------ cache of packed weights


def _pack(call: Call, precision: str) -> PackedLayer:
    weight = call["weight"]
    layout = Layout.natural(weight.shape[1], weight.dtype)
    return pack(call.op, call.stride, call.activation, call.parameters, (layout,) * len(call.maps), precision)


class _Entry(NamedTuple):
    references: list[weakref.ref[Tensor]]
    state: State
    packed: PackedLayer
    shared: Packed


_entries: dict[tuple[Any, ...], _Entry] = {}
_lock = Lock()


def clear_cache() -> None:
    """Forgets all packed weights of the public operators; the next call of each packs again."""
    with _lock:
        _entries.clear()


def packed_of(weights: Iterable[Tensor]) -> list[object]:
    """What is kept for these weights: a graph of calls reads it, and who replays the graph has to hold it."""
    wanted = {id(weight) for weight in weights}
    return [entry for key, entry in [*_entries.items()] if key[0] in wanted]


def _cached(call: Call, precision: str) -> tuple[PackedLayer, Packed | None]:
    """The packed form of a layer, from the cache if it is still that of these parameters, and who else reads it (None:
    it is this call's own). What is packed while a graph is captured is not kept: it holds nothing before the graph is
    replayed.
    """
    if not _cacheable(call):
        return _pack(call, precision), None
    weight, present = call["weight"], call.present
    key = (id(weight), call.op, call.stride, call.activation, precision)
    state = state_of(present)
    entry = _entries.get(key)
    if entry is not None and entry.state == state and all(map(operator.is_, (r() for r in entry.references), present)):
        return entry.packed, entry.shared
    packed = _pack(call, precision)
    if capturing(weight.device):
        return packed, None
    shared = Packed(packed[:4], weight.device)
    forget = weakref.ref(weight, lambda _: _entries.pop(key, None))
    references = [forget if p is weight else weakref.ref(p) for p in present]
    with _lock:
        _entries[key] = _Entry(references, state, packed, shared)
    return packed, shared
