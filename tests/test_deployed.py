"""The deployed network: equal to the training form at every size, dtype and layout, and a well-behaved module."""

import copy
import pickle
import threading

import pytest
import torch
from forms import TINY, image, pair
from oracle import error, randomize

from parnet_kernels import DeployedParNet, ParNet, ParNetConfig, ops, parnet_cifar
from parnet_kernels.config import VARIANTS

each_tiny = pytest.mark.parametrize("config", TINY.values(), ids=TINY)


@each_tiny
@pytest.mark.parametrize("size", [(1, 1), (1, 33), (32, 32), (37, 50), (65, 67)], ids=str)
@torch.no_grad()
def test_exact_in_float64(config: ParNetConfig, size: tuple[int, int]) -> None:
    model, _ = pair(config, hard=True)
    x = image(size, channels=config.in_chans).double()
    deployed = model.deploy()
    assert error(deployed(x), model(x)) <= 1e-12
    assert error(deployed.forward_features(x), model.forward_features(x)) <= 1e-12


@each_tiny
@pytest.mark.parametrize("size", [(1, 1), (37, 50), (64, 64)], ids=str)
@torch.no_grad()
def test_float32(config: ParNetConfig, size: tuple[int, int]) -> None:
    model, deployed = pair(config)
    x = image(size, channels=config.in_chans)
    assert error(deployed(x), model(x.double())) <= 5e-6
    assert error(deployed.forward_features(x), model.forward_features(x.double())) <= 5e-6


@pytest.mark.parametrize(
    ("variant", "size"),
    [
        ("s", (224, 224)),
        ("s", (192, 256)),
        ("s", (225, 225)),
        ("s", (97, 131)),
        ("m", (224, 224)),
        *(pytest.param(v, s, marks=pytest.mark.slow) for v in "m" for s in ((192, 256), (97, 131))),
        ("l", (97, 131)),
        ("xl", (97, 131)),
        *(pytest.param(v, s, marks=pytest.mark.slow) for v in ("l", "xl") for s in ((224, 224), (192, 256))),
    ],
    ids=str,
)
@torch.no_grad()
def test_variants(variant: str, size: tuple[int, int]) -> None:
    model, deployed = pair(variant)
    x = image(size, n=1)
    expected = model(x.double())
    assert error(deployed(x), expected) <= 5e-6
    assert error(model.deploy()(x.double()), expected) <= 1e-12


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)], ids=str)
@torch.no_grad()
def test_16_bit(dtype: torch.dtype, limit: float) -> None:
    model, deployed = pair("s")
    x = image((160, 160), n=1)
    narrow = deployed.to(dtype)(x.to(dtype))
    assert narrow.dtype == dtype
    assert error(narrow, model(x.double())) <= limit


@each_tiny
@torch.no_grad()
def test_channels_last(config: ParNetConfig) -> None:
    _, deployed = pair(config)
    x = image((64, 48), channels=config.in_chans)
    last = x.to(memory_format=torch.channels_last)
    assert torch.allclose(deployed(last), deployed(x), rtol=1e-4, atol=1e-5)
    features = deployed.to(memory_format=torch.channels_last).forward_features(last)
    assert features.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_layer_by_layer_equals_network_kernel() -> None:
    _, deployed = pair(TINY["3 streams"])
    x = image((64, 48))
    found = deployed(x)
    with ops.use_backend("reference"):
        expected = deployed(x)
    assert error(found, expected) <= 5e-6


@torch.no_grad()
def test_forward_hooks_of_layers_see_their_outputs() -> None:
    _, deployed = pair(TINY["3 streams"])
    x = image((64, 48))
    expected = deployed(x)
    seen: dict[str, torch.Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda module, inputs, y, name=name: seen.update({name: y}))
        for name, layer in deployed.layers.items()
    ]
    assert error(deployed(x), expected) <= 5e-6
    assert list(seen) == list(deployed.layers)
    assert error(seen["combine_3"], deployed.forward_features(x)) == 0
    for handle in handles:
        handle.remove()
    assert torch.equal(deployed(x), expected)
    deployed.layers["combine_3"].register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    assert not torch.allclose(deployed(x), expected)


@torch.no_grad()
def test_batches() -> None:
    _, deployed = pair(TINY["3 streams"])
    x = image((48, 64), n=5)
    together = deployed(x)
    assert torch.allclose(together, torch.cat([deployed(x[i : i + 1]) for i in range(5)]), rtol=1e-4, atol=1e-6)
    assert deployed(x[:0]).shape == (0, 4)


def test_deploy_leaves_the_model_as_it_is() -> None:
    model = randomize(ParNet(TINY["3 streams"])).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    deployed = model.deploy()
    deployed.layers["inits_0_0"].weight.zero_()
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_to_train() -> None:
    _, deployed = pair(TINY["3 streams"])
    assert not [p for p in deployed.parameters() if p.requires_grad]
    assert not deployed.training


@torch.no_grad()
def test_state_dict_round_trip() -> None:
    config = TINY["3 streams"]
    _, deployed = pair(config)
    x = image((64, 64))
    other = DeployedParNet(config)
    other.load_state_dict(deployed.prepare().state_dict(), strict=True)
    assert torch.equal(other(x), deployed(x))


@torch.no_grad()
def test_copies() -> None:
    _, deployed = pair(TINY["3 streams"])
    x = image((64, 64))
    expected = deployed(x)
    for twin in (copy.deepcopy(deployed), pickle.loads(pickle.dumps(deployed))):
        assert torch.equal(twin(x), expected)
        twin.layers["streams_0_0"].bias.add_(1)
        assert not torch.equal(twin(x), expected)
    assert torch.equal(deployed(x), expected)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_trace_holds_operators_not_packed_weights() -> None:
    _, deployed = pair(TINY["3 streams"])
    deployed.prepare()
    traced = torch.jit.trace(deployed, image((64, 64)))
    assert "parnet::repvgg_sse" in str(traced.inlined_graph)
    assert "parnet::_cpu" not in str(traced.inlined_graph)
    other = image((96, 33), n=2)
    assert error(traced(other), deployed(other)) <= 1e-6


@torch.no_grad()
def test_threads_share_a_network() -> None:
    _, deployed = pair(TINY["3 streams"])
    images = [image((40 + i, 64)) for i in range(4)]
    expected = [deployed(x) for x in images]
    fresh = copy.deepcopy(deployed)
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            if not torch.equal(fresh(images[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gradient_of_the_input() -> None:
    model, deployed = pair(TINY["3 streams"])
    x = image((33, 40)).requires_grad_()
    wide = x.detach().double().requires_grad_()
    (found,) = torch.autograd.grad(deployed(x).square().sum(), x)
    (expected,) = torch.autograd.grad(model(wide).square().sum(), wide)
    assert error(found, expected) <= 1e-4


@pytest.mark.usefixtures("inductor")
@torch.no_grad()
def test_compile_and_export() -> None:
    torch._dynamo.reset()
    _, deployed = pair(TINY["3 streams"])
    x = image((64, 64))
    expected = deployed(x)
    assert error(torch.compile(deployed, fullgraph=True)(x), expected) <= 1e-5
    exported = torch.export.export(deployed, (x,))
    assert error(exported.module()(x), expected) <= 1e-5


def test_cifar_form() -> None:
    model = randomize(parnet_cifar(width=32)).eval()
    deployed = model.deploy()
    assert sum(b.numel() for b in deployed.parameters()) == 1_304_938
    with torch.no_grad():
        assert deployed(image((32, 32))).shape == (2, 10)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 32, 32), "`x` must have 4 dimensions"),
        (torch.zeros(1, 4, 32, 32), "`x` of shape .* has 4 channels, the network takes 3$"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.float64), r"`x` is torch.float64, the network torch.float32"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "`x` must be a float64, float32"),
        (torch.zeros(1, 3, 0, 32), "`x` must have C, H, W ≥ 1"),
    ],
    ids=["rank", "channels", "dtype", "integers", "empty"],
)
def test_bad_images(x: torch.Tensor, message: str) -> None:
    _, deployed = pair(TINY["3 streams"])
    with pytest.raises(ValueError, match=message):
        deployed(x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_levels_are_independent(variant: str) -> None:
    with torch.device("meta"):
        levels = DeployedParNet(VARIANTS[variant]).levels()
    done = {"image"}
    for level in levels:
        assert all(set(layer.inputs) <= done for layer in level)
        done |= {layer.name for layer in level}


def test_transforms_never_lose_a_tangent() -> None:
    _, deployed = pair(TINY["3 streams"])
    x = image((33, 40))
    y, tangent = torch.func.jvp(deployed, (x,), (torch.ones_like(x),))
    assert error(y, deployed(x)) <= 5e-6
    step = 1e-4
    assert error(tangent, (deployed.double()((x + step).double()) - deployed((x - step).double())) / (2 * step)) <= 1e-2
    deployed.float()
    both = torch.func.vmap(deployed)(torch.stack((x, 2 * x)))
    assert error(both[1], deployed(2 * x)) <= 5e-6
