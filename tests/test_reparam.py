"""Folding is exact: a block in training form equals its operator to 1e-12 in float64, at every size."""

import pytest
import torch
from oracle import OracleBlock, error, randomize

from parnet_kernels import reference
from parnet_kernels.reparam import affine_of, fold_gated_block, fold_identity_block

SIZES = [(1, 1), (1, 5), (2, 2), (3, 3), (7, 7), (14, 9), (16, 16)]


def folded(block: OracleBlock, stride: int) -> dict[str, torch.Tensor]:
    point = block.rbr_1x1 if stride == 1 else block.rbr_1x1[1]
    dense = block.rbr_dense
    branches = (dense.conv.weight, affine_of(dense.bn), point.conv.weight, affine_of(point.bn))
    gate_weight = block.se.cvsig["conv"].weight
    if block.rbr_identity is None:
        return fold_gated_block(*branches, gate_weight, stride)
    return fold_identity_block(*branches, affine_of(block.rbr_identity), gate_weight)


@pytest.mark.parametrize("hard", [False, True], ids=["gamma>0", "gamma any"])
@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("kind", "c", "k", "stride"),
    [
        ("repvgg_sse", 5, 5, 1),
        ("repvgg_sse", 12, 12, 1),
        ("downsample_se", 3, 8, 2),
        ("downsample_se", 6, 6, 2),
        ("downsample_se", 5, 7, 1),
        ("fusion_se", 3, 4, 2),
        ("fusion_se", 4, 4, 1),
        ("fusion_se", 6, 10, 1),
    ],
)
@torch.no_grad()
def test_operator_equals_block(
    kind: str, c: int, k: int, stride: int, size: tuple[int, int], activation: str, hard: bool
) -> None:
    torch.manual_seed(0)
    inputs = 2 if kind == "fusion_se" else 1
    block = OracleBlock(inputs * c, k, stride, inputs, activation).double().eval()
    randomize(block, hard=hard)
    xs = [torch.randn(2, c, *size, dtype=torch.float64) for _ in range(inputs)]
    joined = torch.stack(xs, 2).reshape(2, inputs * c, *size)  # interleaved
    expected = block(joined)
    options = {} if kind == "repvgg_sse" else {"stride": stride}
    found = getattr(reference, kind)(*xs, **folded(block, stride), activation=activation, **options)
    assert found.shape == expected.shape
    assert error(found, expected) <= 1e-12


def test_affine_of_is_float64_of_float32_statistics() -> None:
    bn = torch.nn.BatchNorm2d(7).eval()
    randomize(bn)
    scale, shift = affine_of(bn)
    x = torch.randn(1, 7, 3, 3, dtype=torch.float64)
    assert error(x * scale[:, None, None] + shift[:, None, None], bn.double()(x)) <= 1e-15
