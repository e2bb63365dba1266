"""Whatever is done to a deployed network is seen: layers replaced or patched, weights changed by any way."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from parnet_kernels import DeployedParNet, ParNet, ParNetConfig, ops, parnet_cifar

CFG = ParNetConfig((16, 32, 48, 64), (2, 2, 2), num_classes=10)
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def network(config: ParNetConfig = CFG) -> DeployedParNet:
    torch.manual_seed(3)
    return ParNet(config).eval().deploy()


def layer_by_layer(net: DeployedParNet, x: Tensor) -> Tensor:
    with ops.use_backend("reference"):
        return net(x)


def check(net: DeployedParNet, before: Tensor | None = None) -> None:
    found, expected = net(X), layer_by_layer(net, X)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * max(1, float(expected.detach().abs().max())))
    if before is not None:
        assert not torch.allclose(found, before, rtol=1e-3, atol=1e-3)


class Doubled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Tensor:
        return 2 * self.inner(*inputs)


def patch_forward(net: DeployedParNet, name: str) -> None:
    layer = net.layers[name]
    inner = layer.forward
    layer.forward = lambda *inputs: 2 * inner(*inputs)


def change_class(net: DeployedParNet, name: str) -> None:
    class Other(type(net.layers[name])):  # type: ignore[misc]
        def forward(self, *inputs: Tensor) -> Tensor:
            return 2 * super().forward(*inputs)

    net.layers[name].__class__ = Other


CHANGES: dict[str, Callable[[DeployedParNet, str], object]] = {
    "wrapped": lambda net, name: net.layers.update({name: Doubled(net.layers[name])}),
    "forward": patch_forward,
    "class": change_class,
    "activation": lambda net, name: setattr(net.layers[name], "activation", "relu"),
    "forward hook": lambda net, name: net.layers[name].register_forward_hook(lambda m, i, y: 2 * y),
    "pre-hook": lambda net, name: net.layers[name].register_forward_pre_hook(lambda m, i: tuple(2 * x for x in i)),
    "parametrized": lambda net, name: nn.utils.parametrize.register_parametrization(
        net.layers[name], "weight", Twice(), unsafe=True
    ),
    "parameter": lambda net, name: setattr(net.layers[name], "bias", nn.Parameter(net.layers[name].bias + 1)),
}


class Twice(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


@pytest.mark.parametrize("called", [False, True], ids=["new", "called"])
@pytest.mark.parametrize("name", ["inits_0_0", "streams_1_0", "combine_2", "combine_3"])
@pytest.mark.parametrize("how", CHANGES)
def test_changed_layers_are_used(how: str, name: str, called: bool) -> None:
    net = network()
    before = copy.deepcopy(net)(X)
    if called:
        net(X)
    CHANGES[how](net, name)
    check(net, before)


def test_layers_of_the_cifar_form_may_be_wrapped() -> None:
    net = parnet_cifar(8).eval().deploy()
    x = torch.randn(2, 3, 32, 32)
    expected = net(x)
    net.layers["combine_2"] = nn.Sequential(Both(net.layers["combine_2"]))
    with pytest.raises(TypeError):  # Sequential takes one input: the module that is there is called
        net(x)
    net.layers["combine_2"] = Both(net.layers["combine_2"][0].inner)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
    net = ParNet(CFG.replace(num_classes=0)).eval().deploy()
    net.layers["combine_3"] = nn.Sequential(net.layers["combine_3"])
    assert net(X).shape == (2, 64)


class Both(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.inner(x, y)


def test_global_hooks_see_every_layer() -> None:
    net, seen = network(), []
    net(X)
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, y: seen.append(m))
    try:
        net(X)
    finally:
        handle.remove()
    assert {id(m) for m in net.layers.values()} <= {id(m) for m in seen}


WRITES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda w: w.mul_(1.5),
    "data": lambda w: setattr(w, "data", 1.5 * w.data),
    "data in place": lambda w: w.data.mul_(1.5),
    "numpy": lambda w: w.numpy().__imul__(1.5),
    "storage": lambda w: w.untyped_storage().copy_((1.5 * w).untyped_storage()),
}


@pytest.mark.parametrize("of", ["layers.streams_1_0.weight", "layers.combine_3.bias", "head_weight"])
@pytest.mark.parametrize("how", WRITES)
def test_written_weights_are_used(how: str, of: str) -> None:
    net = network()
    net.head_bias.normal_()
    net.layers["combine_3"].bias.normal_()
    before = net(X)
    WRITES[how](net.get_parameter(of))
    check(net, before)


def test_recycled_addresses_hide_nothing() -> None:
    net = network()
    w = net.layers["streams_1_0"].weight
    for _ in range(30):
        w.data = torch.randn_like(w)
        net(X)
        for _ in range(3):
            w.data = torch.randn_like(w)
        check(net)


@pytest.mark.parametrize("how", ["requires_grad", "parameter"])
def test_gradients_reach_weights_that_ask(how: str) -> None:
    net = network()
    net(X)
    if how == "requires_grad":
        net.head_weight.requires_grad_()
        net.layers["streams_1_0"].weight.requires_grad_()
    else:
        net.head_weight = nn.Parameter(net.head_weight.clone())
        net.layers["streams_1_0"].weight = nn.Parameter(net.layers["streams_1_0"].weight.clone())
    asked = [net.head_weight, net.layers["streams_1_0"].weight]
    found = torch.autograd.grad(net(X).square().sum(), asked)
    expected = torch.autograd.grad(layer_by_layer(net, X).square().sum(), asked)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    optimizer = torch.optim.SGD(asked, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        before = net(X)
        before.square().sum().backward()
        optimizer.step()
        check(net, before.detach())
    with torch.no_grad():
        net.head_weight.zero_()
        torch.testing.assert_close(net(X), net.head_bias.expand(2, -1).clone())


def test_non_leaf_weights_get_gradients() -> None:
    net, scale = network(), torch.ones((), requires_grad=True)
    weights = {name: p * scale for name, p in net.named_parameters()}
    y = torch.func.functional_call(net, weights, X)
    found = torch.autograd.grad(y.sum(), list(weights.values()), allow_unused=True)
    assert all(g is not None for g in found)


def test_functional_call_uses_what_it_is_given() -> None:
    net = network()
    net(X)
    given = {name: 1.2 * b for name, b in net.named_parameters()}
    other = copy.deepcopy(net)
    other.load_state_dict(given)
    torch.testing.assert_close(torch.func.functional_call(net, given, X), other(X), rtol=1e-4, atol=1e-4)
    check(net)


def test_first_call_under_another_default_device_and_dtype() -> None:
    net, expected = network(), network()(X)
    with torch.device("meta"):
        found = net(X)
    assert torch.equal(found, expected)
    torch.set_default_dtype(torch.float64)
    try:
        found = copy.deepcopy(net)(X)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_head_of_the_deployed_form() -> None:
    net = network()
    features = net.forward_features(X)
    torch.testing.assert_close(net.forward_head(features), net(X), rtol=1e-4, atol=1e-5)
    assert net.forward_head(features, pre_logits=True).shape == (2, 64)
    assert "downsample_se, 3 → 16 channels, stride 2, silu" in repr(net)
