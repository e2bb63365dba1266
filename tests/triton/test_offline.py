"""Every tile of every table compiles for the architectures it serves, spills nothing and fits shared memory. No GPU.

The default selection takes 16-bit tiles with the heaviest epilogues; the slow one every tile, precision and kernel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import triton

from parnet_kernels.call import Call
from parnet_kernels.triton import backend, float32_precision, policy
from tests.cases import arguments
from tests.triton.offline import SHARED_LIMIT, Launch, record, resources

SERVES = {
    "sm_80": ["sm_80", "sm_86", "sm_89", "sm_120"],
    "sm_90": ["sm_90"],
    "sm_100": ["sm_100"],
    "gfx942": ["gfx942"],
}
PRECISIONS = {"half": "ieee", "tf32": "tf32", "exact": "ieee", "tf32x3": "tf32x3"}
# Bytes a tile may spill: the compiler of Triton 3.6 spills of three tiles what that of 3.7 keeps in registers.
SPILLED = 20 if triton.__version__.startswith("3.6.") else 0
MATRIX = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}


def step(op: str, dtype: torch.dtype, batch: int, stride: int, size: int = 6) -> None:
    """Forward and backward of one operator."""
    tensors, options = arguments(op, batch, 128, 128, (size, size), dtype=dtype, stride=stride)
    call = Call.of(op, tensors, options)
    backend.backward(call, torch.zeros_like(backend.run(call)), call.tensors.keys())


def launches_with(tile: policy.Tile, kind: str, mode: str, precision: str, ops: tuple[str, ...]) -> list[Launch]:
    """The launches of convolution (or weight-gradient) kernels with this tile, one for each set of constants."""
    dtype = torch.float16 if mode == "half" else torch.float32
    other = policy.Tile(32, 32, 32, 4, 2)

    def tile_for(arch: str, asked: str, *_: Any) -> policy.Tile:
        return tile if asked == kind else other

    def host() -> None:
        for op in ops:
            for stride in (1, 2):
                step(op, dtype, 3, stride)

    with (
        mock.patch.object(policy, "tile_for", tile_for),
        mock.patch.object(policy, "split", return_value=1),
        float32_precision(precision),
    ):
        found = [
            launch
            for launch in record(host)
            if launch.kernel.__name__.startswith("conv" if kind == "conv" else "weight_se_bwd")
        ]
    return list({(launch.kernel, str(constants(launch))): launch for launch in found}.values())


def constants(launch: Launch) -> dict[str, Any]:
    names = [p.name for p in launch.kernel.params if p.is_constexpr]
    return {name: launch.arguments[name] for name in names} | {
        name: None for name, v in launch.arguments.items() if v is None
    }


def check(launch: Launch, target: str) -> None:
    compiled = launch.compile(target)
    used = resources(compiled, target)
    where = f"{launch.kernel.__name__} {constants(launch)} for {target}: {used}"
    assert used.spilled <= SPILLED, where
    assert used.shared <= 1024 * SHARED_LIMIT[target], where
    assert used.registers <= (512 if target == "gfx942" else 255), where


OFTEN = [
    pytest.param(target, marks=[] if target in ("sm_80", "sm_90", "gfx942") else pytest.mark.slow)
    for target in SHARED_LIMIT
]


def used(arch: str, tile: policy.Tile) -> policy.Tile:
    return tile if policy.fenced(arch) else replace(tile, stages=1)


def tiles(kind: str, modes: tuple[str, ...]) -> list[Any]:
    return [
        pytest.param(
            target,
            kind,
            mode,
            PRECISIONS[mode],
            used(arch, tile),
            id=f"{target}-{kind}-{mode}-{tile.bm}x{tile.bn}x{tile.bk}",
        )
        for arch, table in policy.TABLES.items()
        for target in SERVES[arch]
        for mode in modes
        for tile in dict.fromkeys(rule.tile for rule in table[kind, mode])
    ]


@pytest.mark.parametrize(
    ("target", "kind", "mode", "precision", "tile"), tiles("conv", ("half",)) + tiles("weight", ("half",))
)
def test_sixteen_bit_tiles(target: str, kind: str, mode: str, precision: str, tile: policy.Tile) -> None:
    """The convolution with the longest epilogue: RepVGG-SSE block, backward, tiles across images, with an affine."""
    launches = launches_with(tile, kind, mode, precision, ("repvgg_sse",))
    heaviest = [launch for launch in launches if kind == "weight" or launch.kernel.__name__ == "conv_se_bwd_kernel"]
    assert len(heaviest) == 1
    check(heaviest[0], target)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "kind", "mode", "precision", "tile"), tiles("conv", policy.MODES) + tiles("weight", policy.MODES)
)
def test_every_tile(target: str, kind: str, mode: str, precision: str, tile: policy.Tile) -> None:
    for launch in launches_with(tile, kind, mode, precision, ("repvgg_sse", "downsample_se", "fusion_se")):
        check(launch, target)


@pytest.mark.parametrize("target", OFTEN)
def test_small_kernels(target: str) -> None:
    """Packing, gates, sums and the kernel that adds the parts of a split."""
    with mock.patch.object(policy, "split", return_value=2):
        launches = record(lambda: step("fusion_se", torch.float16, 3, 2, 56))
        launches += record(lambda: step("repvgg_sse", torch.float16, 3, 1, 56))
    small = [
        launch
        for launch in launches
        if launch.arguments.get("STAGE") not in ("whole", "part") and launch.kernel.__name__ != "weight_se_bwd_kernel"
    ]
    assert len({launch.kernel.__name__ for launch in small}) == 10
    for launch in {(launch.kernel, str(constants(launch))): launch for launch in small}.values():
        check(launch, target)


@pytest.mark.parametrize("target", MATRIX)
@pytest.mark.parametrize("kind", ["conv", "weight"])
@pytest.mark.parametrize("mode", ["half", "tf32"])
def test_main_loop_is_in_matrix_instructions(target: str, kind: str, mode: str) -> None:
    """wgmma on sm_90, tcgen05 on sm_100: in every tile of the table, and no older mma beside them."""
    for tile in dict.fromkeys(used(target, rule.tile) for rule in policy.TABLES[target][kind, mode]):
        launches = launches_with(tile, kind, mode, PRECISIONS[mode], ("repvgg_sse",))
        ptx = launches[0].compile(target).asm["ptx"]
        assert MATRIX[target] in ptx, tile
        assert "mma.sync" not in ptx, tile
