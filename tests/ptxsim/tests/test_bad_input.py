"""What cannot be run is refused with a clear exception, before anything runs."""

import numpy as np
import pytest
import torch
from ptxsim import PtxError, PtxFault, PtxModule, PtxSanitizerError, Session, Uninit

from .helpers import cuda, run_ptx

HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"


def kernel(body: str, params: str = "", directives: str = "") -> str:
    registers = ".reg .b32 %r<4>; .reg .b64 %rd<4>;"
    return f"{HEADER}.visible .entry k({params}) {directives}\n{{\n {registers}\n {body}\n ret;\n}}\n"


@pytest.mark.parametrize(
    ("ptx", "message"),
    [
        ("", "not a PTX module"),
        ("hello world;", "line 1: cannot parse the declaration"),
        (HEADER + ".visible .entry k()\n{\n ret;\n", "line 4: the body of k does not end"),
        (HEADER + ".visible .entry k(.param .u64 x\n", "line 4: a function header does not end"),
        (HEADER + ".global .u32 x[4] = {1, 2", "line 4: a statement does not end"),
        (HEADER + ".visible .entry k()\n{\n .reg .q77 %r1;\n}\n", "line 6: unsupported register declaration"),
        (HEADER + ".global .u64 p = missing;\n.visible .entry k() { ret; }", "initialised with unknown missing"),
    ],
)
def test_malformed_modules(ptx, message):
    with pytest.raises(PtxError, match=message):
        PtxModule(ptx)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("foo.bar.u32 %r1, %r2;", r"PTX line 7: unknown instruction 'foo.bar.u32'"),
        ("add.u32 %r1, %r2, %r9;", r"PTX line 7: unknown operand '%r9'"),
        ("add.bogus.u32 %r1, %r2, %r3;", r"PTX line 7: unknown instruction form 'add.bogus.u32' \(modifier .bogus\)"),
        ("add.sat.u32 %r1, %r2, %r3;", r"PTX line 7: .sat is not supported for .u32"),
        ("min.ftz.u8 %r1, %r2, %r3;", "PTX line 7"),
        ("bra nowhere;", r"PTX line 7: unknown label nowhere"),
        ("ld.global.u32 %r1, %rd1;", r"PTX line 7: expected an address"),
        ("ld.global.v2.u32 %r1, [%rd1];", r"PTX line 7: vector length mismatch"),
        ("@%p9 mov.u32 %r1, 0;", r"PTX line 7: unknown predicate %p9"),
        ("add.u32 %r1;", r"PTX line 7: 'add.u32' has 1 operands, not 3"),
        ("fma.rn.f32 %r1, %r1, %r1, %r1, %r1;", r"PTX line 7: 'fma.rn.f32' has 5 operands, not 4"),
        ("cp.async.cg.shared.global [%r1], [%rd1], 8;", "PTX line 7: cp.async of 8 bytes"),
        (
            "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], %r2;",
            "tcgen05 .tensor memory of sm_100. is not",
        ),
        (
            "mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r1}, {%r1}, {%r1}, {%r1}, %r1, 0;",
            "PTX line 7: 'mma.sp.sync",
        ),
        ("red.async.relaxed.cluster.shared::cluster.add.u32 [%r1], %r2, [%r3];", r"PTX line 7.*red.async"),
        ("cp.async.bulk.shared::cluster.shared::cta.b8 [%r1], [%r2], 16, [%r3];", "PTX line 7: unsupported bulk copy"),
        ("call (), helper, ();", "indirect or unknown call target 'helper'"),
    ],
)
def test_instructions_that_are_not_known(body, message):
    with pytest.raises(PtxError, match=message) as e:
        PtxModule(kernel(body)).launch("k")
    assert not isinstance(e.value, PtxFault | PtxSanitizerError)


def test_missing_kernel():
    with pytest.raises(PtxError, match=r"no kernel named other; have \['k'\]"):
        PtxModule(kernel("")).launch("other")
    with pytest.raises(PtxError, match="no variable named x"):
        PtxModule(kernel("")).symbol("x")


F = np.zeros(4, np.float32)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([F], r"k takes 3 arguments \(a:u64, n:u32, s:f32\), got 1"),
        ([F, F, 1.0], r"argument 1 \(n, .u32\): got an array"),
        ([F, 1.5, 1.0], r"argument 1 \(n, .u32\): cannot pass a float"),
        ([F, 1 << 32, 1.0], r"argument 1 \(n, .u32\): 4294967296 does not fit"),
        ([F, "x", 1.0], r"argument 1 \(n, .u32\): cannot pass a str"),
        ([F, b"123", 1.0], r"argument 1 \(n, .u32\): 3 bytes given, 4 needed"),
        ([F, Uninit(3), 1.0], r"Uninit takes an array, got int"),
        ([[1, 2], 1, 1.0], r"argument 0 \(a, .u64\): cannot pass a list"),
        ([torch.zeros(4, device="meta"), 1, 1.0], r"CPU tensors, got one on meta"),
    ],
)
def test_arguments(args, message):
    module = PtxModule(kernel("", ".param .u64 a, .param .u32 n, .param .f32 s"))
    with pytest.raises(PtxError, match=message):
        module.launch("k", args=args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": 0}, "bad launch shape"),
        ({"grid": (1, 70000)}, "bad launch shape"),
        ({"block": 2048}, "bad launch shape"),
        ({"block": (1, 1, 128)}, "bad launch shape"),
        ({"grid": (1, 1, 1, 1)}, "1 to 3 dimensions"),
        ({"grid": 100000, "block": 1024}, r"102400000 threads .* too many to simulate in reasonable time"),
        ({"shared_bytes": 200000}, r"200000 bytes of shared memory, sm_80 allows 166912"),
        ({"shared_bytes": -1}, "shared_bytes is -1"),
        ({"check": "maybe"}, "check is 'raise' or 'collect'"),
        ({"races": "often"}, "races True, False or 'strict'"),
        ({"grid": 2, "block_order": [0, 0]}, "block_order"),
        ({"block_order": "sideways"}, "block_order"),
    ],
)
def test_launches(options, message):
    with pytest.raises(PtxError, match=message):
        PtxModule(kernel("")).launch("k", **options)


def test_directives():
    required = PtxModule(kernel("", directives=".reqntid 64"))
    assert required.launch("k", block=64).blocks == 1
    with pytest.raises(PtxError, match=r"requires block \(64,\)"):
        required.launch("k", block=32)
    with pytest.raises(PtxError, match=r"allows at most \(64,\)"):
        PtxModule(kernel("", directives=".maxntid 64")).launch("k", block=128)


def test_another_block_of_the_cluster():
    with pytest.raises(PtxFault, match="mapa asks for block 1 of a cluster of 1 block"):
        run_ptx("mov.u32 %o, 0; mapa.shared::cluster.u32 %x0, %t, 1;", [], "u4")


def test_nothing_runs_before_the_check():
    a = np.zeros(32, np.float32)
    with pytest.raises(PtxError, match="takes 4 arguments"):
        cuda("basic").launch("vadd", block=32, args=[a, a, a])
    with pytest.raises(PtxError, match="too many to simulate"):
        cuda("basic").launch("vadd", grid=4, block=32, args=[a + 1, a + 1, a, 32], max_threads=100)
    assert (a == 0).all()


def test_registering_something_else():
    with pytest.raises(PtxError, match="cannot register a int"):
        Session().register(3)
