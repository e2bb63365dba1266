"""The cache of packed weights behind the public operators: hits, never stale, keeps nothing alive."""

import gc
import threading
import weakref

import pytest
import torch
from cases import OPERATORS, arguments
from oracle import error

from parnet_kernels import _native, cpu, ops, reference

pytestmark = pytest.mark.skipif(_native.cpu_error is not None, reason=str(_native.cpu_error))
each_operator = pytest.mark.parametrize("op", OPERATORS)


@pytest.fixture(autouse=True)
def empty_cache():
    cpu.clear_cache()
    yield
    cpu.clear_cache()


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one at every packing."""
    calls: list[str] = []
    pack = cpu.pack

    def counting(op: str, *args, **kwargs) -> torch.Tensor:
        calls.append(op)
        return pack(op, *args, **kwargs)

    monkeypatch.setattr(cpu, "pack", counting)
    return calls


def check(op: str, args: list, options: dict) -> None:
    """The operator agrees with the reference now."""
    with ops.use_backend("cpu"):
        found = getattr(torch.ops.parnet, op)(*args, **options)
    assert error(found, getattr(reference, op)(*args, **options)) <= 3e-6


def parameters_of(op: str, args: list, options: dict) -> list[torch.Tensor]:
    maps = 2 if op == "fusion_se" else 1
    return [p for p in [*args[maps:], options["out_scale"], options["out_shift"]] if p is not None]


def test_earlier_maps_do_not_change_a_bit() -> None:
    """Weights are stored differently for large maps and for small ones; a call takes what its own map asks for."""
    args, options = arguments("repvgg_sse", c=24, k=24, size=(28, 28))
    small = [torch.randn(1, 24, 8, 8), *args[1:]]
    with ops.use_backend("cpu"):
        large_first = [torch.ops.parnet.repvgg_sse(*each, **options) for each in (args, small)]
        cpu.clear_cache()
        small_first = [torch.ops.parnet.repvgg_sse(*each, **options) for each in (small, args)]
    assert torch.equal(large_first[0], small_first[1])
    assert torch.equal(large_first[1], small_first[0])


@each_operator
def test_packs_once(op: str, packs: list[str]) -> None:
    args, options = arguments(op, c=8, k=8)
    for _ in range(3):
        check(op, args, options)
    args[0] = torch.randn(1, 8, 9, 9)
    if op == "fusion_se":
        args[1] = torch.randn(1, 8, 9, 9)
    check(op, args, options)
    assert packs == [op]


@each_operator
def test_parameters_are_modules_parameters(op: str, packs: list[str]) -> None:
    args, options = arguments(op, c=8, k=8)
    maps = 2 if op == "fusion_se" else 1
    args[maps:] = [torch.nn.Parameter(p) for p in args[maps:]]
    for _ in range(2):
        with torch.no_grad():
            check(op, args, options)
    assert packs == [op]


@each_operator
def test_update_in_place(op: str, packs: list[str]) -> None:
    args, options = arguments(op, c=8, k=8)
    parameters = parameters_of(op, args, options)
    check(op, args, options)
    for parameter in parameters:
        parameter.view(-1)[-1] += 1
        check(op, args, options)
    assert len(packs) == 1 + len(parameters)


@each_operator
def test_update_behind_the_version_counter(op: str) -> None:
    args, options = arguments(op, c=16, k=24)
    check(op, args, options)
    for parameter in parameters_of(op, args, options):
        version = parameter._version
        parameter.data.mul_(1.5)
        assert parameter._version == version
        check(op, args, options)
        parameter.detach().numpy()[...] += 0.25
        check(op, args, options)


@each_operator
def test_update_of_one_value_of_a_vector_behind_the_version_counter(op: str) -> None:
    args, options = arguments(op, c=16, k=24)
    check(op, args, options)
    for parameter in parameters_of(op, args, options):
        if parameter.dim() == 1:
            parameter.data[7] += 1
            check(op, args, options)


@each_operator
def test_new_memory(op: str) -> None:
    args, options = arguments(op, c=8, k=8)
    check(op, args, options)
    for parameter in parameters_of(op, args, options):
        parameter.data = parameter.data.flip(0).contiguous()
        check(op, args, options)


@each_operator
def test_other_parameters_with_the_same_weight(op: str) -> None:
    args, options = arguments(op, c=8, k=8)
    check(op, args, options)
    for i in range((2 if op == "fusion_se" else 1) + 1, len(args)):
        args[i] = args[i] + 1
        check(op, args, options)
    check(op, [*args[:-1], None], options)
    check(op, args, options | {"out_scale": None, "out_shift": None})
    check(op, args, options | {"activation": "relu"})
    if op != "repvgg_sse":
        check(op, args, options | {"stride": 1})


def test_weights_that_live_for_one_call() -> None:
    """Their ids are used again at once."""
    for seed in range(20):
        args, options = arguments("downsample_se", c=8, k=8, seed=seed)
        check("downsample_se", [args[0], args[1].view(8, 8, 3, 3), *args[2:]], options)
        del args
    gc.collect()
    assert not cpu._entries


@each_operator
def test_nothing_is_kept_alive(op: str) -> None:
    args, options = arguments(op, c=8, k=8)
    check(op, args, options)
    (entry,) = cpu._entries.values()
    references = [weakref.ref(p) for p in [*parameters_of(op, args, options), entry.packed]]
    del entry, args, options
    gc.collect()
    assert not cpu._entries
    assert [r() for r in references] == [None] * len(references)


def test_inference_tensors_are_compared_in_full(packs: list[str]) -> None:
    with torch.inference_mode():
        args, options = arguments("repvgg_sse", c=8)
        check("repvgg_sse", args, options)
        check("repvgg_sse", args, options)
        assert len(packs) == 1
        args[1].view(-1)[101] += 0.5
        check("repvgg_sse", args, options)
    assert len(packs) == 2


def test_ordinary_tensors_in_inference_mode(packs: list[str]) -> None:
    args, options = arguments("repvgg_sse", c=8)
    with torch.inference_mode():
        check("repvgg_sse", args, options)
        args[1].view(-1)[101] += 0.5
        check("repvgg_sse", args, options)
    assert len(packs) == 2


def test_optimizer_step_and_load_state_dict() -> None:
    args, options = arguments("downsample_se", c=8, k=8)
    module = torch.nn.ParameterList(args[1:])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    saved = {name: value.clone() for name, value in module.state_dict().items()}
    for _ in range(2):
        torch.ops.parnet.downsample_se(args[0], *module, **options).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            check("downsample_se", [args[0], *module], options)
    module.load_state_dict(saved)
    with torch.no_grad():
        check("downsample_se", [args[0], *module], options)


def test_threads_share_one_entry() -> None:
    args, options = arguments("repvgg_sse", c=24, size=(9, 9))
    expected = torch.ops.parnet.repvgg_sse(*args, **options)
    cpu.clear_cache()
    results: list[torch.Tensor] = []

    def call() -> None:
        results.extend(torch.ops.parnet.repvgg_sse(*args, **options) for _ in range(20))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert all(torch.equal(expected, r) for r in results)
    assert len(cpu._entries) == 1
