"""The packed weights of a deployed network: what they take, and that they are never stale."""

import copy
import weakref

import pytest
import torch
from forms import TINY, image, pair
from oracle import error, randomize

from parnet_kernels import DeployedParNet, ParNet, _native, ops
from parnet_kernels.config import VARIANTS
from parnet_kernels.cpu.network import storages


@torch.no_grad()
def test_changes_of_weights_are_seen() -> None:
    """In place, by assignment, by load_state_dict, by conversion: never a stale packed weight."""
    model, deployed = pair(TINY["3 streams"])
    x = image((64, 64))
    before = deployed(x)
    state = copy.deepcopy(deployed.state_dict())

    deployed.layers["streams_1_0"].weight.mul_(0.5)
    with ops.use_backend("reference"):
        expected = deployed(x)
    assert error(deployed(x), expected) <= 5e-6
    assert not torch.allclose(expected, before, rtol=1e-3)

    deployed.load_state_dict(state)
    assert torch.equal(deployed(x), before)

    deployed.layers["combine_3"].bias = torch.nn.Parameter(deployed.layers["combine_3"].bias + 1, False)
    assert not torch.allclose(deployed(x), before, rtol=1e-3)
    deployed.load_state_dict(state)
    assert error(deployed.double()(x.double()), model(x.double())) <= 5e-6
    assert torch.equal(deployed.float()(x), before)


def test_storage_of_a_network_knows_its_maps() -> None:
    with torch.device("meta"):
        network = DeployedParNet(VARIANTS["l"])
    lanes = _native.cpu_info()["lanes"]
    found = dict(zip(network.layers, storages(network.whole(), "auto"), strict=True))
    assert {found[name] for name in ("inits_0_0", "streams_0_0", "downsamples_2_0")} == {"transformed"}
    small = {found[name] for name in ("inits_2", "streams_2_0", "downsamples_2_1_2")}
    assert small == {"rows" if lanes == 16 else "transformed"}
    assert found["combine_3"] == "taps"
    assert set(storages(network.whole(), "rows")) == {"rows"}


@torch.no_grad()
def test_conversion_frees_packed_weights() -> None:
    _, deployed = pair(TINY["3 streams"])
    held = weakref.ref(deployed._native.prepare(deployed.whole()).weights)
    deployed.double()
    assert held() is None


@pytest.mark.parametrize(
    ("variant", "auto", "others"),
    [
        pytest.param("s", {16: 201, 8: 389}, (389, 163, 72), id="s"),
        pytest.param("m", {16: 370, 8: 716}, (716, 302, 134), id="m", marks=pytest.mark.slow),
    ],
)
def test_memory_of_packed_weights(variant: str, auto: dict[int, int], others: tuple[int, int, int]) -> None:
    """README's numbers, in MB; "auto" is not the same for vectors of 16 and of 8 lanes."""
    network = DeployedParNet(VARIANTS[variant])
    lanes = _native.cpu_info()["lanes"]
    for storage, expected in zip(("auto", "transformed", "rows", "taps"), (auto[lanes], *others), strict=True):
        packed = network.prepare(storage=storage)._native.prepare(network.whole())
        assert packed is not None
        assert round(packed.weights.numel() / 1e6) == expected


@torch.no_grad()
def test_storage_trades_memory_for_time() -> None:
    _, deployed = pair(TINY["3 streams"])
    x = image((64, 64))
    expected = deployed.prepare(storage="transformed")(x)
    large = deployed._native.prepare(deployed.whole()).weights.numel()
    assert error(deployed.prepare(storage="taps")(x), expected.double()) <= 5e-6
    assert deployed._native.prepare(deployed.whole()).weights.numel() < large / 2
    with pytest.raises(ValueError, match="`storage` must be one of"):
        deployed.prepare(storage="int8")


def test_made_in_inference_mode() -> None:
    x = image((64, 64))
    with torch.inference_mode():
        deployed = randomize(ParNet(TINY["3 streams"])).eval().deploy().half().float().prepare()
        before = deployed(x)
        deployed.layers["streams_1_0"].weight.mul_(0.5)
        assert not torch.allclose(deployed(x), before, rtol=1e-3)
    assert not any(b.is_inference() for b in deployed.parameters())


@torch.no_grad()
def test_replaced_weights_are_seen_whatever_their_address() -> None:
    _, deployed = pair(TINY["3 streams"])
    x = image((33, 40))
    deployed.head_bias = torch.nn.Parameter(torch.zeros(4), False)
    for i in range(20):
        deployed(x)
        for j in range(2):  # the second may take the place of the one that is packed
            deployed.head_bias = torch.nn.Parameter(torch.full((4,), 10.0 * i + j), False)
        with ops.use_backend("reference"):
            expected = deployed(x)
        assert error(deployed(x), expected) <= 5e-6
    deployed.head_bias.data = torch.full((4,), -5.0)
    with ops.use_backend("reference"):
        expected = deployed(x)
    assert error(deployed(x), expected) <= 5e-6
    deployed.layers["combine_3"].bias.data.mul_(2)  # bypasses the version counter
    with ops.use_backend("reference"):
        expected = deployed(x)
    assert error(deployed.prepare()(x), expected) <= 5e-6


def test_inference_tensors_as_weights() -> None:
    _, deployed = pair(TINY["3 streams"])
    x = image((33, 40))
    with torch.inference_mode():
        expected = deployed(x)
        twin = copy.deepcopy(deployed).prepare()
        assert error(twin(x), expected) <= 5e-6
        deployed.layers["streams_1_0"].weight = torch.nn.Parameter(0.5 * deployed.layers["streams_1_0"].weight, False)
        assert not torch.allclose(deployed(x), expected, rtol=1e-3)


def test_prepare_off_the_cpu_does_nothing() -> None:
    _, deployed = pair(TINY["3 streams"])
    assert deployed.to("meta").prepare()._native._packed is None


@torch.no_grad()
def test_weights_that_are_not_finite() -> None:
    _, deployed = pair(TINY["3 streams"])
    x = image((33, 40))
    weight = deployed.layers["combine_3"].weight
    finite = deployed(x)
    weight[1, 2, 0, 0] = float("inf")
    with ops.use_backend("reference"):
        expected = deployed.forward_features(x)
    for _ in range(2):
        found = deployed.forward_features(x)
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-4, atol=1e-5)
    weight[1, 2, 0, 0] = 0
    assert deployed(x).isfinite().all()
    assert finite.isfinite().all()
