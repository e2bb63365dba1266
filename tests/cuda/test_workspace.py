"""Scratch memory and packed weights between streams, with streams that write down what they are told."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import networks
import pytest
import torch
from cases import arguments, to

from parnet_kernels.call import Call
from parnet_kernels.cuda import backend as cuda
from parnet_kernels.cuda import network as cuda_network
from parnet_kernels.cuda import workspace as memory
from parnet_kernels.cuda.record import COUNTER_BYTES

DEVICE = torch.device("cuda", 0)
DEFAULT, PER_THREAD, POOLED, EXTERNAL = (0, 0), (2, 2), (0x7F00, 35), (0x55AA, 0x55AA)  # handle, id


class Stream:
    device_index = 0

    def __init__(self, kind, log):
        (self.cuda_stream, self.stream_id), self.log = kind, log

    def wait_event(self, event):
        self.log.append(f"{self.cuda_stream:x} waits")

    def synchronize(self):
        self.log.append(f"{self.cuda_stream:x} ends")


class Event:
    def record(self, stream):
        stream.log.append(f"after {stream.cuda_stream:x}")


@pytest.fixture
def current(monkeypatch):
    """Sets the current stream; the log of what streams were told."""
    log, state = [], threading.local()

    def choose(kind):
        state.kind = kind
        return log

    choose(DEFAULT)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(getattr(state, "kind", DEFAULT), log))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(memory, "capturing", lambda device: False)
    monkeypatch.setattr(memory, "allocate", lambda device, size: torch.empty(size, dtype=torch.uint8))
    memory.release()
    yield choose
    memory.release()


def take(size=64):
    with memory.workspace(DEVICE, size) as block:
        return block


def test_only_counters_are_cleared(monkeypatch):
    """In a graph's replay too, where the clearing is a part of the graph."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(0xFF))
    block = memory.allocate(torch.device("cpu"), COUNTER_BYTES + 100)
    assert not block[:COUNTER_BYTES].any()
    assert (block[COUNTER_BYTES:] == 0xFF).all()


def test_a_block_a_stream(current):
    blocks = []
    for kind in (DEFAULT, POOLED, EXTERNAL, DEFAULT, POOLED):
        current(kind)
        blocks.append(take())
    assert blocks[3] is blocks[0]
    assert blocks[4] is blocks[1]
    assert len({b.data_ptr() for b in blocks}) == 3


def test_a_block_a_thread_on_the_default_stream_of_a_thread(current):
    blocks = {}

    def work(i):
        current(PER_THREAD)
        blocks[i] = take(), take()
        both.wait()  # thread numbers are given anew

    both = threading.Barrier(2)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert blocks[0][0] is blocks[0][1]
    assert blocks[0][0] is not blocks[1][0]


def test_a_handle_that_may_be_given_to_a_new_stream(current):
    log = current(EXTERNAL)
    first = take()
    assert log == ["after 55aa"]
    assert take() is first
    assert log == ["after 55aa", "55aa waits", "after 55aa"]
    log.clear()
    for kind in (DEFAULT, POOLED, POOLED):
        current(kind)
        take()
    assert log == []  # these live as long as the process


class Tensor:
    def __init__(self):
        self.streams = []

    def record_stream(self, stream):
        self.streams.append(stream.cuda_stream)


def test_packed_weights_outlive_launches_on_other_streams(current):
    log = current(POOLED)
    tensors = [Tensor(), Tensor()]
    packed = memory.Packed(tensors, DEVICE)
    assert log == ["7f00 ends"]  # all may read them from now on
    for kind in (POOLED, EXTERNAL, POOLED, EXTERNAL, DEFAULT):
        current(kind)
        packed.read(DEVICE)
    assert all(t.streams == [EXTERNAL[0], DEFAULT[0]] for t in tensors)  # the allocator need be told once


def test_who_reads_packed_weights_says_so(monkeypatch):
    """Operators and networks, each time; not what is packed for one call."""
    read = []
    monkeypatch.setattr(memory.Packed, "read", lambda self, device: read.append([*self.tensors]))
    for module in (cuda, cuda_network):
        monkeypatch.setattr(module, "play", lambda buffers, program: None)
        monkeypatch.setattr(module, "workspace", lambda device, size: nullcontext(torch.empty(size, dtype=torch.uint8)))
        monkeypatch.setattr(module, "Gpu", type("Gpu", (), {"of": staticmethod(lambda _: networks.A100)}))
    cuda.clear_cache()
    args, options = to(torch.float16, *arguments("downsample_se", dtype=torch.float64, c=16, k=8))
    for _ in range(2):
        cuda.run(Call.of("downsample_se", args, options))
    (entry,) = cuda._entries.values()
    assert len(read) == 2
    assert all(len(r) == 4 and all(map(lambda a, b: a is b, r, entry.packed[:4])) for r in read)
    read.clear()
    network, x = networks.tiny().half(), torch.randn(1, 3, 16, 16).half()
    for _ in range(2):
        network._cuda_network.run(network.whole(), x, "logits")
    assert len(read) == 2
    assert read[0][0] is next(iter(network._cuda_network._weights.values()))[1].tensors[0]
    read.clear()
    args[1].requires_grad_()
    cuda.run(Call.of("downsample_se", args, options))
    assert read == []
