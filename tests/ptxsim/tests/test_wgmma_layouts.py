"""wgmma operands in every layout of shared memory, from images that are made here by the rules of the PTX ISA."""

import numpy as np
import pytest
from ptxsim import PtxModule

from .helpers import RNG

M, N, K = 64, 64, 16  # of 2-byte elements: two core matrices along k
WIDTHS = {"none": 16, "32B": 32, "64B": 64, "128B": 128}
MODES = {"none": 0, "128B": 1, "64B": 2, "32B": 3}


def image(matrix: np.ndarray, swizzle: str, mn_major: bool) -> tuple[np.ndarray, int]:
    """Shared memory with `matrix` [rows, K] in it, and the descriptor but for its address."""
    rows, width = matrix.shape[0], WIDTHS[swizzle]
    per = width // 2  # elements in a row of the swizzle atom
    if swizzle == "none":  # core matrices of 8 x 16 bytes; along k first
        leading, stride = (128, 256) if not mn_major else (rows * 16, 128)
    elif not mn_major:
        leading, stride = 16, 8 * width
    else:
        leading, stride = 16 * width, 8 * width
    memory = np.zeros(16384, np.uint8)
    for row in range(rows):
        for k in range(K):
            if swizzle == "none" and not mn_major:
                at = row // 8 * stride + k // 8 * leading + row % 8 * 16 + k % 8 * 2
            elif swizzle == "none":
                at = row // 8 * stride + k // 8 * leading + k % 8 * 16 + row % 8 * 2
            elif not mn_major:
                at = row // 8 * stride + row % 8 * width + k * 2
            else:
                at = row // per * leading + k // 8 * stride + k % 8 * width + row % per * 2
            if swizzle != "none":  # 16-byte pieces are exchanged within 128 bytes times 8
                at ^= (at >> 7 & (width // 16 - 1)) << 4
            memory[at : at + 2] = np.frombuffer(matrix[row, k].tobytes(), np.uint8)
    return memory, (leading >> 4) << 16 | (stride >> 4) << 32 | MODES[swizzle] << 62


KERNEL = """.version 8.4
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 image, .param .u64 out, .param .u64 desc_a, .param .u64 desc_b)
{{
.reg .b64 %y<8>; .reg .b32 %t, %i, %a, %x<40>; .reg .pred %q<3>;
.shared .align 1024 .b8 smem[32768];
mov.u32 %t, %tid.x; ld.param.u64 %y0, [image]; ld.param.u64 %y1, [out];
shl.b32 %i, %t, 4; mov.u32 %a, smem;
L: cvt.u64.u32 %y2, %i; add.u64 %y2, %y2, %y0; ld.global.v4.u32 {{%x0, %x1, %x2, %x3}}, [%y2];
add.u32 %x4, %a, %i; st.shared.v4.u32 [%x4], {{%x0, %x1, %x2, %x3}};
add.u32 %i, %i, 2048; setp.lt.u32 %q0, %i, 32768; @%q0 bra L;
fence.proxy.async.shared::cta; bar.sync 0;
shr.u32 %a, %a, 4; cvt.u64.u32 %y2, %a;
ld.param.u64 %y3, [desc_a]; or.b64 %y3, %y3, %y2;
ld.param.u64 %y4, [desc_b]; or.b64 %y4, %y4, %y2; add.u64 %y4, %y4, 1024;
{zero} setp.ne.u32 %q1, 1, 0;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n64k16.{d}.{kind}.{kind} {{{registers}}}, %y3, %y4, %q1, 1, 1, {trans_a}, {trans_b};
wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
mad.wide.u32 %y1, %t, {bytes}, %y1;
{stores}
ret;
}}
"""


def run(A, B, swizzle, trans_a, trans_b, d, kind):
    count = N // 2 if d == "f32" else N // 4
    registers = [f"%x{i}" for i in range(count)]
    ptx = KERNEL.format(
        zero=" ".join(f"mov.u32 {r}, 0;" for r in registers),
        registers=", ".join(registers),
        stores=" ".join(f"st.global.u32 [%y1+{4 * i}], {r};" for i, r in enumerate(registers)),
        bytes=4 * count,
        d=d,
        kind=kind,
        trans_a=int(trans_a),
        trans_b=int(trans_b),
    )
    image_a, desc_a = image(A, swizzle, trans_a)
    image_b, desc_b = image(B, swizzle, trans_b)
    out = np.zeros((128, count), np.uint32)
    r = PtxModule(ptx).launch("k", block=128, args=[np.concatenate([image_a, image_b]), out, desc_a, desc_b])
    D = np.zeros((M, N))
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        values = out[thread].view(np.float32) if d == "f32" else out[thread].view(np.float16)
        for i, value in enumerate(values):
            D[16 * warp + lane // 4 + 8 * (i // 2 % 2), i // 4 * 8 + lane % 4 * 2 + i % 2] = value
    return D, r


@pytest.mark.parametrize("trans_b", [False, True], ids=["B k-major", "B n-major"])
@pytest.mark.parametrize("trans_a", [False, True], ids=["A k-major", "A m-major"])
@pytest.mark.parametrize("swizzle", WIDTHS)
def test_layouts(swizzle, trans_a, trans_b):
    A, B = (RNG.integers(-8, 8, (rows, K)).astype(np.float16) for rows in (M, N))
    D, r = run(A, B, swizzle, trans_a, trans_b, "f32", "f16")
    assert np.array_equal(D, A.astype(np.float64) @ B.T.astype(np.float64))
    assert r.wgmma_operands["bytes"] == 2 * (M + N) * K
    assert r.mma_flops == 2 * M * N * K


def test_half_accumulators():
    A, B = (RNG.standard_normal((rows, K)).astype(np.float16) for rows in (M, N))
    D, _ = run(A, B, "128B", False, False, "f16", "f16")
    np.testing.assert_allclose(D, A.astype(np.float64) @ B.T.astype(np.float64), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("swizzle", WIDTHS)
def test_these_layouts_have_no_bank_conflicts(swizzle):
    A, B = (np.ones((rows, K), np.float16) for rows in (M, N))
    operands = run(A, B, swizzle, False, False, "f32", "f16")[1].wgmma_operands
    assert operands["wavefronts"] == operands["ideal_wavefronts"] == (M + N) * K * 2 / 128
