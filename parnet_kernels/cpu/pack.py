"""Plain weights → the layout that the CPU kernels read ("packed", `torch.ops.parnet._cpu_pack`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parnet_kernels.call import OPERATORS

#: The names that native code knows by number, in the order of its enumerations (csrc/cpu/layer.h, csrc/cpu/policy.h).
CODES = {
    "kind": OPERATORS,
    "activation": ("silu", "relu"),
    "storage": ("transformed", "rows", "taps"),
}
OPTIONAL = dict.fromkeys(("gate_bias", "skip_scale", "skip_shift", "out_scale", "out_shift"))

Parameters = dict[str, Tensor | None]


def storage_of(pixels: int, weight: Tensor | None) -> str:
    """The storage that suits a layer's weights, where one image of its result has `pixels`: see csrc/cpu/policy.h."""
    assert weight is not None
    code: int = torch.ops.parnet._cpu_storage.default(pixels, weight.shape[0], weight.shape[1])
    return CODES["storage"][code]


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


def pack(op: str, stride: int, activation: str, parameters: Parameters, storage: str = "transformed") -> Tensor:
    """The packed form of one layer; `storage`: see `DeployedParNet.prepare`."""
    options = {"kind": op, "stride": stride, "activation": activation, "storage": storage}
    return pack_layers([{**OPTIONAL, **parameters, **options}])[0]


def are_finite(tensors: list[Tensor]) -> bool:
    """Whether none of them holds NaN or infinity; asked once, before packing."""
    return all(bool(t.isfinite().all()) for t in tensors)
