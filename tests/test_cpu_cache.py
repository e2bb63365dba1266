"""The cache of packed weights behind the public operators: hits, never stale, keeps nothing alive."""

import functools
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from cases import OPERATORS, arguments
from oracle import error

from parnet_kernels import _native, checks, ops, reference
from parnet_kernels.call import Call
from parnet_kernels.cpu import cache as cpu

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


# ------------------------------------------------------------------ repeated calls, `cpu.again`


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one at every call that goes the long way."""
    calls: list[str] = []
    check = checks.check

    def counting(call: Call) -> None:
        calls.append(call.op)
        check(call)

    monkeypatch.setattr(checks, "check", counting)
    return calls


@each_operator
def test_a_call_like_the_last_one_is_not_checked_again(op: str, checked: list[str]) -> None:
    args, options = arguments(op, c=8, k=8)
    maps = 2 if op == "fusion_se" else 1
    for _ in range(3):
        args[:maps] = [torch.randn_like(x) for x in args[:maps]]
        check(op, args, options)
    assert len(checked) == 1
    others: list[dict[str, Any]] = [options | {"activation": "relu"}, options | {"out_scale": None, "out_shift": None}]
    others += [options | {"stride": 1}] if op != "repvgg_sse" else []
    for other in others:
        check(op, args, other)
    before = len(checked)
    for shape in ((1, 8, 9, 9), (0, 8, 9, 9), (2, 8, 9, 10)):
        args[:maps] = [torch.randn(shape)] * maps
        assert getattr(torch.ops.parnet, op)(*args, **options).shape[0] == shape[0]
    args[:maps] = [x.contiguous(memory_format=torch.channels_last) for x in args[:maps]]
    check(op, args, options)
    assert len(checked) == before + 4


@each_operator
def test_a_repeated_call_sees_what_is_not_finite(op: str) -> None:
    args, options = arguments(op, c=8, k=8)
    check(op, args, options)
    for i in range(2 if op == "fusion_se" else 1):
        x = args[i].clone()
        x[0, 3, 1, 2] = float("nan")
        found = getattr(torch.ops.parnet, op)(*args[:i], x, *args[i + 1 :], **options)
        expected = getattr(reference, op)(*args[:i], x, *args[i + 1 :], **options)
        assert torch.equal(found.isnan(), expected.isnan())


def test_a_repeated_call_with_changed_arguments_is_checked() -> None:
    args, options = arguments("downsample_se", c=8, k=8)
    check("downsample_se", args, options)
    call = functools.partial(torch.ops.parnet.downsample_se, **options)
    with pytest.raises(ValueError, match="`x` must be a dense tensor"):
        call(args[0].to_sparse(), *args[1:])
    with pytest.raises(ValueError, match="`x` must have 4 dimensions"):
        call(args[0][0], *args[1:])
    with pytest.raises(ValueError, match="`x` must have the dtype of the parameters"):
        call(args[0].double(), *args[1:])
    with pytest.raises(ValueError, match="`x` must be on the device of the parameters, cpu, got meta"):
        call(args[0].to("meta"), *args[1:])
    args[1].data = args[1].data.view(8, 24, 3)  # the same memory and version counter
    with pytest.raises(ValueError, match="`weight` must have 4 dimensions"):
        call(*args)
    args[1].data = args[1].data.view(8, 8, 3, 3)
    check("downsample_se", args, options)


def test_a_repeated_call_with_a_parameter_in_another_place_is_checked() -> None:
    args, options = arguments("downsample_se", c=8, k=8, affine=False)
    check("downsample_se", args, options | {"out_scale": None, "out_shift": None})
    with pytest.raises(ValueError, match="`out_shift` must be given together with `out_scale`"):
        torch.ops.parnet.downsample_se(*args[:4], None, **options, out_scale=args[4])


def test_a_repeated_call_goes_where_it_is_asked_to(checked: list[str]) -> None:
    args, options = arguments("repvgg_sse", c=8)
    for _ in range(2):
        torch.ops.parnet.repvgg_sse(*args, **options)
    for name in ("reference", "cpu", "reference"):
        with ops.use_backend(name):
            torch.ops.parnet.repvgg_sse(*args, **options)
    assert len(checked) == 4


def test_calls_are_remembered_up_to_a_limit(packs: list[str]) -> None:
    args, options = arguments("repvgg_sse", c=4)
    for width in range(1, 2 * cpu.MAX_LOOKS):
        torch.ops.parnet.repvgg_sse(torch.randn(1, 4, 3, width), *args[1:], **options)
        assert len(cpu._calls) <= cpu.MAX_LOOKS
    assert len(packs) == 1
    del args
    gc.collect()
    assert not cpu._calls


def test_packed_weights_die_with_any_parameter() -> None:
    args, options = arguments("repvgg_sse", c=8)
    check("repvgg_sse", args, options)
    packed = weakref.ref(next(iter(cpu._entries.values())).packed)
    args[2] = args[2] + 1
    gc.collect()
    assert packed() is None
    assert not cpu._entries
    assert not cpu._calls


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
