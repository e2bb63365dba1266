"""One operator's call as a program, for the tests of single layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from cases import arguments, to
from player import play, workspace
from ptxsim.device import Device
from torch import Tensor

from parnet_kernels import reference
from parnet_kernels.call import Call
from parnet_kernels.cuda import backend as cuda
from parnet_kernels.cuda import plan as cuda_plan
from parnet_kernels.cuda import record as cuda_record
from parnet_kernels.cuda.pack import PackedLayer
from parnet_kernels.cuda.plan import A100, Gpu, plan_level
from parnet_kernels.cuda.program import Pairing
from parnet_kernels.cuda.record import COUNTER_BYTES

#: (dtype, precision, norm-wise error allowed)
MATHS = {
    "f16": (torch.float16, "ieee", 1e-3),
    "bf16": (torch.bfloat16, "ieee", 8e-3),
    "tf32": (torch.float32, "tf32", 1e-3),
    "f32": (torch.float32, "ieee", 2e-6),
}


def pack(op: str, args: list[Any], options: dict[str, Any], precision: str) -> tuple[list[Tensor], PackedLayer]:
    """The maps and the packed layer of a call."""
    call = Call.of(op, args, options)
    return [*call.maps], cuda._pack(call, precision)


def run(
    device: Device,
    op: str,
    math: str = "f16",
    gpu: Gpu = A100,
    tile: int | None = None,
    splits: int | None = None,
    pairing: Pairing = Pairing.ALONE,
    layout: Any = lambda x: x,
    simulator: dict[str, Any] | None = None,
    **case: Any,
) -> tuple[Tensor, Tensor, list[Any]]:
    """(result [N, K, H, W], the reference in float64, counters of the launches) of an operator on `cases.arguments`.

    tile, splits: instead of the planned ones, and `pairing` with them. layout: of the input maps.
    """
    dtype, precision, _ = MATHS[math]
    args, options = to(dtype, *arguments(op, dtype=torch.float64, **case))
    maps, packed = pack(op, args, options, precision)
    maps = [layout(m) for m in maps]
    exact, exact_options = to(torch.float64, [*maps, *args[len(maps) :]], options)
    expected = getattr(reference, op)(*exact, **exact_options)
    maps = [device.tensor(m) for m in maps]

    def plan(shapes: Any, gpu: Gpu, math: str) -> Any:
        tilings = plan_level(shapes, gpu, math)
        if tile is not None:
            tilings = tuple(cuda_plan._spatial(s, tile, gpu) for s in shapes)
        if tile is None and splits is None:
            return tilings
        return tuple(replace(t, splits=splits or t.splits, pairing=pairing) for t in tilings)

    before, cuda_record.plan_level = cuda_record.plan_level, plan
    try:
        shapes = tuple((tuple(m.shape), m.stride(), m.data_ptr() % 16 == 0) for m in maps)
        recorded = cuda._record.__wrapped__(op, shapes, dtype, precision, gpu, cuda._Geometry(*packed[4:]))
    finally:
        cuda_record.plan_level = before
    memory = workspace(device, recorded.workspace_bytes)
    result = device.empty(*recorded.shape, dtype=dtype)
    buffers = [memory, result, *maps, *(device.tensor(t) for t in packed[:4])]
    results = play(device, recorded.program, buffers, gpu, **(simulator or {}))
    assert not memory[:COUNTER_BYTES].any(), "counters are not zero after the launch"
    return result.permute(0, 3, 1, 2).cpu(), expected, results
