"""How large numbers, and sums, may be: what docs/operators.md says of the native CPU kernels."""

from __future__ import annotations

import pytest
import torch
from cases import arguments, to
from oracle import error

from parnet_kernels import _native, ops, reference

pytestmark = pytest.mark.skipif(_native.cpu_error is not None, reason=str(_native.cpu_error))


@pytest.mark.parametrize("big", ["map", "weight", "both"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitudes_up_to_the_documented_limit(dtype: torch.dtype, stride: int, big: str) -> None:
    """1e34, of signs at random and of signs that add up in every transform of a tile."""
    c, k, limit = 40, 24, 1e34
    of_x, of_w = {"map": (1.0, 0.0), "weight": (0.0, 1.0), "both": (0.5, 0.5)}[big]
    generator = torch.Generator().manual_seed(0)
    checkered = (-1.0) ** (torch.arange(13)[:, None] + torch.arange(13))
    maps = [torch.randn(1, c, 13, 13, generator=generator).sign() for _ in range(3)]
    for x in [*maps, checkered.expand(1, c, 13, 13), torch.ones(1, c, 13, 13)]:
        weight = torch.randn(k, c, 3, 3, generator=generator).sign() / (9 * c)
        given = (x * limit**of_x, weight * limit**of_w, torch.zeros(k), torch.zeros(k, c))
        args = [t.to(dtype) for t in given]
        with ops.use_backend("cpu"):
            found = ops.downsample_se(*args, stride=stride, activation="relu")
        expected = reference.downsample_se(*(t.double() for t in args), stride=stride, activation="relu")
        # Errors of tiles are relative to the products, most of which random signs cancel.
        assert (found.double() - expected).abs().max() <= (1e-2 if dtype == torch.bfloat16 else 1e-5) * limit


@pytest.mark.slow
def test_sums_of_a_million_channels() -> None:
    args, options = arguments("downsample_se", n=1, c=1_048_577, k=2, size=(3, 3))
    with ops.use_backend("cpu"):
        found = ops.downsample_se(*args, **options)
    expected = reference.downsample_se(*to(torch.float64, args, options)[0], **to(torch.float64, args, options)[1])
    assert error(found, expected) <= 1e-5
