"""Accesses of global memory that wait for each other, counted on kernels whose chains are plain to see."""

import numpy as np
import pytest
from ptxsim import PtxModule

KERNEL = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry kernel(.param .u64 x)
{{
  .reg .b64 %x, %at;
  .reg .b32 %a, %b, %c, %i, %t, %s;
  .reg .b32 %f<4>;
  .reg .pred %p;
  .shared .align 16 .b8 area[1024];
  ld.param.u64 %x, [x];
  mov.u32 %t, %tid.x;
  mov.u32 %s, area;
{body}
  ret;
}}
"""
LOAD_A, LOAD_B = "ld.global.u32 %a, [%x];", "ld.global.u32 %b, [%x+4];"
USE_A, USE_B = "add.u32 %a, %a, 1;", "add.u32 %b, %b, 1;"
COPY, COMMIT, WAIT = "cp.async.cg.shared.global [%s], [%x], 16;", "cp.async.commit_group;", "cp.async.wait_group {};"
MULTIPLY = """
  mov.b32 %f0, 0; mov.b32 %f1, 0; mov.b32 %f2, 0; mov.b32 %f3, 0;
  mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
    {%f0,%f1,%f2,%f3}, {%a,%a,%a,%a}, {%a,%a}, {%f0,%f1,%f2,%f3};
"""
CASES = {
    "nothing": ([], (0, 0)),
    "loads beside each other": ([LOAD_A, LOAD_B, USE_A, USE_B], (1, 0)),
    "a load behind a wait": ([LOAD_A, USE_A, LOAD_B, USE_B], (2, 0)),
    "an unused load": ([LOAD_A, USE_A, LOAD_B], (1, 0)),
    "an address that was loaded": (
        [LOAD_A, "mad.wide.u32 %at, %a, 4, %x;", "ld.global.u32 %b, [%at];", USE_B],
        (2, 0),
    ),
    "a move": ([LOAD_A, "mov.u32 %c, %a;", LOAD_B, "add.u32 %c, %c, %b;"], (1, 0)),
    "a guard": ([LOAD_A, "setp.eq.u32 %p, %a, 77;", "@%p ld.global.u32 %b, [%x+4];", LOAD_B, USE_B], (2, 0)),
    "generic and shared": (
        ["st.shared.u32 [%s], %t;", "ld.shared.u32 %a, [%s];", USE_A, "ld.u32 %b, [%x];", USE_B],
        (1, 0),
    ),
    "atomic": (["atom.global.add.u32 %a, [%x], 0;", USE_A], (1, 0)),
    "store and fence": (["st.global.u32 [%x], %t;", "membar.gl;"], (1, 0)),
    "store without fence": (["st.global.u32 [%x], %t;"], (0, 0)),
    "copies": ([COPY, COMMIT, LOAD_A, USE_A, COPY, COMMIT, WAIT.format(1), LOAD_B, USE_B], (2, 0)),
    "all copies": ([COPY, COMMIT, LOAD_A, USE_A, COPY, COMMIT, WAIT.format(0), LOAD_B, USE_B], (3, 0)),
    "polls": (
        [
            "mov.u32 %i, 0;",
            "again: ld.acquire.gpu.global.u32 %a, [%x];",
            "add.u32 %i, %i, %a;",
            "setp.lt.u32 %p, %i, 5;",
            "@%p bra again;",
        ],
        (1, 0),
    ),
    "barrier": (
        ["setp.ge.u32 %p, %t, 32;", "@%p bra meet;", LOAD_A, USE_A, "meet: bar.sync 0;", LOAD_B, USE_B],
        (2, 0),
    ),
    "dependent launch": ([LOAD_A, USE_A, "griddepcontrol.wait;", LOAD_B, USE_B], (1, 0)),
    "before and after products": (
        [LOAD_A, "mov.u32 %b, 0;", MULTIPLY, LOAD_B, USE_B, MULTIPLY, LOAD_A, USE_A, LOAD_B, USE_B],
        (1, 2),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_round_trips(case):
    body, expected = CASES[case]
    x = np.ones(64, np.int32)
    run = PtxModule(KERNEL.format(body="\n".join(body))).launch(
        "kernel", block=64, args=[x], round_trips=True, check="collect"
    )
    assert run.round_trips == expected


def test_not_counted_unless_asked_for():
    run = PtxModule(KERNEL.format(body="")).launch("kernel", block=32, args=[np.ones(64, np.int32)])
    assert run.round_trips is None
