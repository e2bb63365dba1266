"""The host side without a GPU: structures, the player's checks and messages, predicates."""

import re

import pytest
import torch
from player import decode, host

from parnet_kernels import _native
from parnet_kernels.cuda import backend as cuda
from parnet_kernels.cuda.program import (
    ClassifierCall,
    EnterCall,
    Kind,
    Program,
    address,
    layout,
    strided,
)

needs_library = pytest.mark.skipif(bool(_native.cuda_error), reason=f"no CUDA library: {_native.cuda_error}")


def classifier(buffer=3, offset=64):
    program = Program("bf16")
    call = ClassifierCall(address(0, 256), 0, address(buffer, offset), address(1), 1, 2, 32, 20, 10, 0.5)
    program.launch(Kind.CLASSIFIER, 3, 0, call, "head [1, 20]", 1)
    return program


def test_mirrors_have_the_names_sizes_and_offsets_of_the_structs():
    """And the constants their values: "name value", line by line, as the headers of csrc/cuda have them."""
    lines = host().parnet_layout().decode().splitlines()
    assert {name: int(value) for name, value in (line.split() for line in lines)} == layout()


def test_addresses_are_put_in():
    buffers = [(1000 * (i + 1), 512) for i in range(4)]
    (launch,) = decode(classifier().tensor(), buffers)
    assert (launch.kernel, launch.grid, launch.shared, launch.flags) == ("parnet_classifier_bf16", 3, 0, 1)
    call = ClassifierCall.from_buffer_copy(launch.arguments)
    assert (call.sums, call.weight, call.bias, call.y) == (1256, 0, 4064, 2000)
    assert (call.n, call.features, call.inverse_area) == (1, 20, 0.5)
    assert launch.label == "head [1, 20]"


def test_sequence_of_launches():
    program = classifier()
    call = EnterCall(strided((1, 3, 4, 5), (60, 20, 5, 1), address(2)), address(0), address(0, 128), 32, 1)
    program.launch(Kind.ENTER, 1, 0, call, "enter")
    launches = decode(program.tensor(), [(4096, 1024)] * 4)
    assert [launch.label for launch in launches] == ["head [1, 20]", "enter"]
    assert EnterCall.from_buffer_copy(launches[1].arguments).input.data == 4096


@pytest.mark.parametrize(("buffer", "offset"), [(4, 0), (3, 513), (9, 0)])
def test_addresses_outside_their_buffers_are_refused(buffer, offset):
    with pytest.raises(RuntimeError, match=r"head \[1, 20\]: address 1 is outside its buffer"):
        decode(classifier(buffer, offset).tensor(), [(4096, 512)] * 4)


@pytest.mark.parametrize("cut", [8, 40, -8])
def test_damaged_programs_are_refused(cut):
    with pytest.raises(RuntimeError, match="`program` is"):
        decode(classifier().tensor()[:cut], [(4096, 512)] * 4)


def test_a_failed_launch_is_named_and_ends_the_program():
    program = classifier()
    program.launch(Kind.CLASSIFIER, 1, 0, ClassifierCall(), "second")
    text = "head [1, 20]: parnet_classifier_bf16, 3 blocks, 0 bytes of shared memory, failed: too many resources"
    with pytest.raises(RuntimeError, match=f"^{re.escape(text)}$"):
        decode(program.tensor(), [(4096, 512)] * 4, error_at=0)


def test_empty_grids_are_refused():
    with pytest.raises(ValueError, match="nothing: a grid of 0 blocks"):
        Program("f16").launch(Kind.CLASSIFIER, 0, 0, ClassifierCall(), "nothing")


@needs_library
@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.empty(1, 8, 4, 4), "x is on cpu"),
        (torch.empty(1, 8, 4, 4, device="meta"), "x is on meta"),
    ],
    ids=["cpu", "meta"],
)
def test_reasons(x, reason):
    assert cuda.why_not("repvgg_sse", x) == reason


@needs_library
def test_disabling():
    cuda.disable("the self-test failed")
    try:
        assert cuda.why_not("repvgg_sse", torch.empty(1, 8, 4, 4)) == "the self-test failed"
    finally:
        cuda.disable(None)


@needs_library
def test_play_refuses_tensors_off_the_gpu():
    with pytest.raises(RuntimeError, match="`buffers` must be CUDA tensors"):
        torch.ops.parnet._cuda_play([torch.zeros(4)], classifier().tensor())
