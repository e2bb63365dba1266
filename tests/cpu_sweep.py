"""Random cases of the native CPU kernels against the float64 reference. Also a script, because the instruction set is
chosen once per process: PARNET_CPU_ISA=portable python tests/cpu_sweep.py SEED COUNT. And all 16-bit numbers."""

from __future__ import annotations

import itertools
import random
import sys

import torch
from cases import OPERATORS, arguments, to
from oracle import error
from torch import Tensor

from parnet_kernels import _native, reference
from parnet_kernels.call import Call
from parnet_kernels.cpu import pack as cpu

LIMITS = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
CHANNELS = (1, 2, 3, 5, 8, 12, 16, 31, 33, 64, 92, 130)
EXTENTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 28, 31, 65, 67)


def as_strides(x: Tensor, how: str) -> Tensor:
    """The values of x in another memory layout."""
    if how == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if how == "sliced":  # a part of a wider tensor, every stride odd
        n, c, h, w = x.shape
        wide = x.new_full((n, c + 3, h + 1, 2 * w + 1), float("nan"))
        wide[:, 2 : 2 + c, 1:, 1::2] = x
        return wide[:, 2 : 2 + c, 1:, 1::2]
    if how == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x.contiguous()


def run(op: str, args: list, options: dict, storage: str = "transformed") -> Tensor:
    """One call of the native kernel, past dispatch and cache."""
    call = Call.of(op, args, options)
    packed = cpu.pack(op, call.stride, call.activation, call.parameters, storage)
    channels_last = call.x.is_contiguous(memory_format=torch.channels_last)
    return torch.ops.parnet._cpu_layer(call.x, call.maps[1] if len(call.maps) == 2 else None, packed, channels_last)


def expected_of(op: str, args: list, options: dict) -> Tensor:
    """The float64 reference of one call."""
    wide_args, wide_options = to(torch.float64, args, options)
    return getattr(reference, op)(*wide_args, **wide_options)


def random_case(rng: random.Random) -> dict:
    op = rng.choice(OPERATORS)
    k = rng.choice(CHANNELS)
    small = rng.random() < 0.8  # the largest maps are slow in float64
    return {
        "op": op,
        "n": rng.choice((1, 2, 3)),
        "c": rng.choice(CHANNELS),
        "k": k + k % 2 if op == "fusion_se" else k,
        "size": tuple(rng.choice(EXTENTS[:-4] if small else EXTENTS) for _ in range(2)),
        "stride": 1 if op == "repvgg_sse" else rng.choice((1, 2)),
        "activation": rng.choice(("silu", "relu")),
        "gate_bias": rng.random() < 0.7,
        "affine": rng.random() < 0.5,
        "dtype": rng.choice((torch.float32, torch.float32, torch.float16, torch.bfloat16)),
        "seed": rng.randrange(1000),
    }


def failure(rng: random.Random) -> str | None:
    """Runs one random case; what is wrong with the result, or None."""
    case = random_case(rng)
    storage, threads = rng.choice(("transformed", "rows", "taps")), rng.choice((1, 2, 3))
    how = [rng.choice(("contiguous", "channels_last", "sliced", "transposed")) for _ in range(2)]
    args, options = arguments(**case)
    expected = getattr(reference, case["op"])(*to(torch.float64, args, {})[0], **to(torch.float64, [], options)[1])
    maps = 2 if case["op"] == "fusion_se" else 1
    args = [as_strides(x, how[i]) if i < maps else x for i, x in enumerate(args)]
    torch.set_num_threads(threads)
    found = run(case["op"], args, options, storage)
    found_error = error(found, expected)
    if found.shape == expected.shape and found.dtype == case["dtype"] and found_error <= LIMITS[case["dtype"]]:
        return None
    return f"{case} {storage=} {threads=} {how=}: error {found_error:.2e}, {found.shape}, {found.dtype}"


def wrong_conversions(dtype: torch.dtype) -> list[str]:
    """Of every 16-bit number (bfloat16: none so large that sums overflow), in and, multiplied, out again."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).view(1, 16, 64, 64)
    x = torch.where(x.abs() < 1e30, x, 1).to(dtype)  # NaN and infinity as well
    x = torch.cat([x, x[..., :9]], 3)  # whole vectors, and some pixels more
    c = x.shape[1]
    zero, one = torch.zeros(c, dtype=dtype), torch.ones(c, dtype=dtype)
    wrong = []
    for sign, factor, how in itertools.product((1, -1), (1, 0.8, 1.7, 3e4, 3e-5), ("contiguous", "channels_last")):
        # Neither convolution nor bias, a gate of 1: relu(±x) times a factor.
        args = [as_strides(x, how), x.new_zeros(c, c, 3, 3), zero, sign * one, zero, x.new_zeros(c, c), 100 * one]
        found = run("repvgg_sse", args, {"activation": "relu", "out_scale": factor * one, "out_shift": zero})
        expected = (torch.relu(sign * x.float()) * (factor * one[0]).float()).to(dtype)
        if not torch.equal(found, expected):
            wrong.append(f"{dtype} {sign=} {factor=} {how}: {(found != expected).sum()} wrong")
    return wrong


def main(seed: int, count: int) -> None:
    rng = random.Random(seed)
    failures = [text for _ in range(count) if (text := failure(rng))]
    failures += wrong_conversions(torch.float16) + wrong_conversions(torch.bfloat16)
    print(*failures, f"{_native.cpu_info()}: {count} cases, {len(failures)} failures", sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
