"""The Python side of the backend, with the player in the simulator's place of the GPU; and on a GPU, the real thing."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import networks
import player
import pytest
import torch
from cases import arguments, to
from oracle import error
from single import MATHS

from parnet_kernels import ops, reference, selection
from parnet_kernels.app import selftest
from parnet_kernels.call import Call
from parnet_kernels.config import ParNetConfig
from parnet_kernels.cuda import backend as cuda
from parnet_kernels.cuda import network as cuda_network
from parnet_kernels.cuda.plan import A100
from parnet_kernels.cuda.program import EnterCall


class Played(list):
    """(buffers, program) of each call, and the device that ran it."""

    device = None


@pytest.fixture
def played(device, monkeypatch):
    """Programs of the backend's Python code run in the simulator, on CPU tensors."""
    if not device.simulated:
        pytest.skip("the real thing is tested below")
    calls = Played()
    calls.device = device

    def play(buffers, program):
        player.play(device, program, buffers)
        calls.append((buffers, program))

    @contextmanager
    def workspace(_, size):
        yield player.workspace(device, size)

    for module in (cuda, cuda_network):
        monkeypatch.setattr(module, "play", play)
        monkeypatch.setattr(module, "workspace", workspace)
        monkeypatch.setattr(module, "Gpu", type("Gpu", (), {"of": staticmethod(lambda _: A100)}))
    cuda.clear_cache()
    return calls


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("op", ["repvgg_sse", "downsample_se", "fusion_se"])
def test_run(played, op, channels_last):
    args, options = to(torch.float16, *arguments(op, dtype=torch.float64, n=2, c=32, k=20, size=(7, 9)))
    expected = getattr(reference, op)(*to(torch.float64, args, options)[0], **to(torch.float64, args, options)[1])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    args = [
        t.contiguous(memory_format=layout) if t is not None and t.dim() == 4 and i < 2 else t
        for i, t in enumerate(args)
    ]
    y = cuda.run(Call.of(op, args, options))
    assert error(y, expected) <= 1e-3
    assert y.is_contiguous(memory_format=layout)


def test_packed_weights_are_kept_while_current(played):
    args, options = to(torch.float16, *arguments("downsample_se", dtype=torch.float64, c=16, k=8))

    def run():
        y = cuda.run(Call.of("downsample_se", args, options))
        return y, played[-1][0][3]  # the packed weight

    first, packed = run()
    again, same = run()
    assert same is packed
    assert torch.equal(first, again)
    args[1].mul_(2)
    changed, other = run()
    assert other is not packed
    assert not torch.equal(changed, first)
    args[1] = args[1].clone()
    assert run()[1] is not other


def test_parameters_that_require_gradients_are_packed_anew(played):
    args, options = to(torch.float32, *arguments("downsample_se", dtype=torch.float64, c=16, k=8))
    args[1].requires_grad_()
    with torch.no_grad():
        first = cuda.run(Call.of("downsample_se", args, options))
        args[1].data.mul_(2)  # behind the version counter's back
        assert not torch.equal(cuda.run(Call.of("downsample_se", args, options)), first)
    assert not cuda._entries


def test_what_is_packed_during_a_capture_is_not_kept(played, monkeypatch):
    """Its kernels have not run yet, and may never."""
    args, options = to(torch.float16, *arguments("downsample_se", dtype=torch.float64, c=16, k=8))
    network, x = networks.tiny().half(), torch.randn(1, 3, 16, 16).half()
    for module in (cuda, cuda_network):
        monkeypatch.setattr(module, "capturing", lambda _: True)
    first = cuda.run(Call.of("downsample_se", args, options))
    assert not cuda._entries
    network._cuda_network.run(network.whole(), x, "logits")
    assert not network._cuda_network._weights
    for module in (cuda, cuda_network):
        monkeypatch.setattr(module, "capturing", lambda _: False)
    assert torch.equal(cuda.run(Call.of("downsample_se", args, options)), first)
    assert cuda._entries


def test_maps_that_are_not_aligned(played):
    """Copied, like every map that cannot be read where it lies; others of the same shape and strides are not."""
    args, options = to(torch.float16, *arguments("repvgg_sse", dtype=torch.float64, n=1, c=32, size=(6, 7)))
    args[0] = args[0].contiguous(memory_format=torch.channels_last)
    memory = torch.empty(args[0].numel() + 8, dtype=torch.float16)
    first = (-memory.data_ptr() // 2) % 8  # of 16 bytes
    results = []
    for shift in (0, 1):
        x = memory[first + shift :].as_strided(args[0].shape, args[0].stride())
        x.copy_(args[0])
        assert x.data_ptr() % 16 == 2 * shift
        results.append(cuda.run(Call.of("repvgg_sse", [x, *args[1:]], options)))
    assert torch.equal(*results)
    in_place, copied = (player.decode(program, [(1 << 40, 1 << 40)] * len(b))[0] for b, program in played)
    assert EnterCall.from_buffer_copy(in_place.arguments).out == 0
    assert EnterCall.from_buffer_copy(copied.arguments).out != 0


CIFAR = ParNetConfig((8, 12, 16, 24), (3, 3, 3), num_classes=5, pointwise_head=True)


@pytest.mark.parametrize("config", [networks.TINY, CIFAR, replace(CIFAR, num_classes=0)], ids=["", "cifar", "pooled"])
def test_capture(played, monkeypatch, config):
    """With a graph that plays its launches when it is replayed."""
    network, images = networks.tiny(config), torch.randn(2, 1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = [network(x) for x in images]

    class Graph:
        def replay(self):
            captured._launch()

    class Stream:
        def wait_stream(self, other): ...
        def wait_event(self, event): ...

    class Event:
        def record(self, stream): ...

    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: nullcontext())
    for name, value in {"CUDAGraph": Graph, "Stream": Stream, "Event": Event, "current_stream": Stream}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(cuda_network, "tensor_missing", lambda _: None)
    monkeypatch.setattr(cuda_network, "allocate", lambda _, size: player.workspace(played.device, size))
    with torch.no_grad():
        network, images = network.float(), images.float()
        captured = network.capture(images[0])
        network.head_weight.zero_()  # the weights are those of the time of capture
        if config.pointwise_head:
            network.layers["combine_3"].weight.zero_()
        for x, y in zip(images, expected, strict=True):
            assert error(captured(x), y) <= 5e-3  # tf32
    with pytest.raises(ValueError, match="`x` must be"):
        captured(images[0][..., :16])


@pytest.mark.parametrize("result", ["logits", "pooled", "features"])
def test_network(played, result):
    network, x = networks.tiny(), torch.randn(1, 3, 40, 33, dtype=torch.float64)
    with torch.no_grad():
        features = network.forward_features(x)
        expected = {"logits": network(x), "pooled": features.mean((2, 3)), "features": features}[result]
    network = network.float()
    runner = network._cuda_network
    with torch.no_grad():
        y = runner.run(network.whole(), x.float(), result)
        assert error(y, expected) <= 5e-3
        if result == "features":
            assert y.is_contiguous()
        before = runner.weights(network.whole(), "ieee")
        assert runner.weights(network.whole(), "ieee") is before
        network.layers["inits_0_0"].weight.mul_(2)
        assert runner.weights(network.whole(), "ieee") is not before
        assert not torch.equal(runner.run(network.whole(), x.float(), result), y)


def test_who_packs_at_each_call_leaves_it_to_triton(monkeypatch):
    """The choice of a backend is made once, in `selection`."""
    for backend, able in (("cuda", True), ("triton", True), ("cpu", False)):
        monkeypatch.setattr(selection.BACKENDS[backend], "why_not", lambda op, x, able=able: None if able else "no")
    args, options = arguments("repvgg_sse", c=4)
    call = Call.of("repvgg_sse", args, options)
    assert selection.choose(call) is cuda
    args[1].requires_grad_()
    assert selection.choose(call) is selection.BACKENDS["triton"]
    monkeypatch.setattr(selection.BACKENDS["triton"], "why_not", lambda op, x: "not here")
    assert selection.choose(call) is cuda


@pytest.mark.parametrize("op", ["repvgg_sse", "downsample_se", "fusion_se"])
def test_backward_without_triton(played, monkeypatch, op):
    """Parameters learn, the maps do not: forward on the kernels, gradients by the formulas for every backend."""
    for backend, able in (("cuda", True), ("triton", False), ("cpu", False)):
        monkeypatch.setattr(selection.BACKENDS[backend], "why_not", lambda op, x, able=able: None if able else "no")
    args, options = to(torch.float32, *arguments(op, dtype=torch.float64, c=4))
    parameters = [*args[2 if op == "fusion_se" else 1 :], options["out_scale"], options["out_shift"]]
    for t in parameters:
        t.requires_grad_()
    expected = getattr(reference, op)(*args, **options)
    g = torch.randn_like(expected)
    y = getattr(ops, op)(*args, **options)
    assert len(played) == 1
    for a, b in zip(torch.autograd.grad(y, parameters, g), torch.autograd.grad(expected, parameters, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
def test_selftest_passes():
    rows = selftest.selftest()
    assert any(row.backend == "cuda" for row in rows)
    assert [row for row in rows if not row.passed] == []


@pytest.mark.gpu
@pytest.mark.parametrize("math", MATHS)
def test_operators(math):
    dtype, _, allowed = MATHS[math]
    args, options = to(dtype, *arguments("repvgg_sse", dtype=torch.float64, n=3, c=72, size=(15, 17)))
    expected = reference.repvgg_sse(*to(torch.float64, args, options)[0], **to(torch.float64, args, options)[1])
    args = [t.cuda() for t in args]
    options = {k: v.cuda() if torch.is_tensor(v) else v for k, v in options.items()}
    with ops.use_backend("cuda"), torch.no_grad():
        assert error(ops.repvgg_sse(*args, **options).cpu(), expected) <= max(allowed, 1e-3)


@pytest.mark.gpu
def test_streams_and_capture():
    network = networks.tiny().half().cuda()
    x = torch.randn(1, 3, 64, 64, device="cuda", dtype=torch.half)
    with torch.no_grad():
        expected = network(x)
        streams = [torch.cuda.Stream() for _ in range(3)]
        found = []
        torch.cuda.synchronize()
        for stream in streams:
            with torch.cuda.stream(stream):
                found += [network(x) for _ in range(5)]
        torch.cuda.synchronize()
        assert all(torch.equal(y, expected) for y in found)
        captured = network.capture(x)
        assert torch.equal(captured(x), expected)
        assert torch.equal(captured(2 * x), network(2 * x))
        with pytest.raises(ValueError, match="`x` must be"):
            captured(x[..., :32])
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        captured(x)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
