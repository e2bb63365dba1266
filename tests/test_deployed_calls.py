"""When a deployed network is one call of the native kernels and when not; what is wrong with an image; gradients."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_deployed_changes import CFG, X, check, layer_by_layer, network
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from parnet_kernels import DeployedParNet, ParNet, _native, deployed, ops, parnet_cifar

needs_kernels = pytest.mark.skipif(_native.cpu_error is not None, reason=str(_native.cpu_error))


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(op))
        return op(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Seen, SeenFunctions])
def test_modes_see_every_operator(mode: type[Seen] | type[SeenFunctions]) -> None:
    net = network()
    net(X)
    with mode() as seen:
        net(X)
    names = {name for name in seen.names if "parnet" in name}
    assert names == {f"parnet.{op}.default" for op in ("repvgg_sse", "downsample_se", "fusion_se")}


@needs_kernels
def test_default_devices_and_dtypes_keep_the_one_call() -> None:
    net = network()
    with torch.device("meta"):
        assert net.why_layer_by_layer(X) is None


@contextmanager
def patched_class() -> Iterator[None]:
    """DeployedLayer.forward gives twice what it gave."""
    original = deployed.DeployedLayer.forward
    deployed.DeployedLayer.forward = lambda self, *x: 2 * original(self, *x)  # type: ignore[method-assign]
    try:
        yield
    finally:
        deployed.DeployedLayer.forward = original  # type: ignore[method-assign]


def test_a_patched_class_of_layers_is_used() -> None:
    net = network()
    before = net(X)
    with patched_class():
        check(net, before)
    check(net)


def test_other_arguments_of_a_layer_are_used() -> None:
    net = network()
    before, layer = net(X), net.layers["streams_1_0"]
    given = {name: 1.5 * t for name, t in layer.arguments().items()}
    layer.arguments = lambda: given
    check(net, before)


def test_a_compiled_layer_is_called() -> None:
    net, graphs = network(), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        net(X)
        net.layers["combine_2"].compile(backend=backend)
        check(net)
    assert graphs


def test_parts_that_a_subclass_changes_are_used() -> None:
    class Features(DeployedParNet):
        def forward_features(self, x: Tensor) -> Tensor:
            return 2 * super().forward_features(x)

    net = network()
    expected = net.forward_head(2 * net.forward_features(X))
    net.__class__ = Features
    torch.testing.assert_close(net(X), expected)
    net = network()
    net.forward_head = lambda x: x.sum((2, 3))  # type: ignore[method-assign]
    torch.testing.assert_close(net(X), net.forward_features(X).sum((2, 3)))


def test_weights_of_two_dtypes_are_an_error_not_a_guess() -> None:
    net = network()
    net(X)
    net.layers["combine_3"].double()
    with pytest.raises(ValueError, match="`x` must have the dtype of the parameters"):
        net(X)


def test_a_tangent_of_a_weight_is_not_lost() -> None:
    net = network()
    net(X)
    with forward_ad.dual_level():
        tangent = torch.randn_like(net.head_weight)
        dual = forward_ad.make_dual(net.head_weight, tangent)
        found = forward_ad.unpack_dual(torch.func.functional_call(net, {"head_weight": dual}, X)).tangent
    pooled = network().forward_head(network().forward_features(X), pre_logits=True)
    torch.testing.assert_close(found, pooled @ tangent.T, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_what_is_undone_leaves_the_packed_weights() -> None:
    net = network().prepare()
    packed = net._native._packed
    handle = net.layers["combine_3"].register_forward_hook(lambda m, x, y: 2 * y)
    assert net.why_layer_by_layer(X) == "layers.combine_3: has hooks"
    net(X)
    handle.remove()
    net.train().eval()
    net(X)
    assert net._native._packed is packed


@needs_kernels
def test_parameters_without_gradients_are_one_call() -> None:
    net = network()
    net.head_weight = nn.Parameter(net.head_weight.clone())
    assert net.why_layer_by_layer(X) == "weights need gradients"
    with torch.no_grad():
        assert net.why_layer_by_layer(X) is None
        before = net(X)
        net.head_weight.mul_(2)
        check(net, before)


def test_a_network_that_is_asked_for_gradients_trains() -> None:
    net = network().requires_grad_()
    net(X).square().sum().backward()
    assert all(b.grad is not None and b.grad.isfinite().all() for b in net.parameters())
    net.zero_grad()
    assert all(b.grad is None for b in net.parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = net(X).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert not net.requires_grad_(False)(X).requires_grad
    check(net)


@pytest.mark.parametrize("where", ["network", "layer"])
def test_parametrized_weights_train(where: str) -> None:
    net = network()
    net(X)
    module, name = (net, "head_weight") if where == "network" else (net.layers["combine_3"], "weight")
    original = getattr(module, name)
    setattr(module, name, nn.Parameter(original.clone()))
    nn.utils.parametrizations.weight_norm(module, name)
    net(X).square().sum().backward()
    asking = [p for p in net.parameters() if p.requires_grad]
    assert len(asking) == 2
    assert all(p.grad is not None for p in asking)
    torch.testing.assert_close(getattr(module, name).detach(), original)
    check(net)


def test_a_wrapped_layer_trains_alone() -> None:
    """As LoRA does: the layer as it is, and something small beside it."""

    class Beside(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.scale = inner, nn.Parameter(torch.zeros(64, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * (1 + self.scale)

    net = network()
    expected = net(X)
    net.layers["combine_3"] = Beside(net.layers["combine_3"])
    torch.testing.assert_close(net(X), expected, rtol=1e-4, atol=1e-4)
    net(X).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["layers.combine_3.scale"]


def test_an_ensemble_under_vmap() -> None:
    nets = [network(CFG.replace(activation="relu")) for _ in range(3)]
    for i, net in enumerate(nets):
        net(X)
        for b in net.parameters():
            b.mul_(1 + 0.1 * i)
    parameters, buffers = torch.func.stack_module_state(nets)
    base = copy.deepcopy(nets[0])
    found = torch.func.vmap(lambda p: torch.func.functional_call(base, p, (X,)))(parameters)
    assert not buffers
    for y, net in zip(found, nets, strict=True):
        torch.testing.assert_close(y, layer_by_layer(net, X), rtol=1e-4, atol=1e-4)


def test_deploy_under_another_default_device() -> None:
    model = ParNet(CFG).eval()
    expected = model.deploy()(X)
    with torch.device("meta"):
        net = model.deploy()
        assert torch.equal(net(X), expected)
        assert torch.equal(net.prepare()(X), expected)
        torch.testing.assert_close(layer_by_layer(net, X), expected, rtol=1e-4, atol=1e-4)


def test_profilers_see_names() -> None:
    net = network()

    def names() -> set[str]:
        with profile() as seen:
            net(X)
        return {event.key for event in seen.key_averages()}

    net(X)
    assert "parnet::network" in names()
    with ops.use_backend("reference"):
        assert {"inits.0.0", "downsamples_2.1.2", "combine.3", "head"} <= names()


@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        (torch.zeros(2, 48, 64, 3), ValueError, r"48 channels, the network takes 3: it looks channels-last"),
        (torch.zeros(2, 5, 64, 64), ValueError, r"has 5 channels, the network takes 3$"),
        (torch.zeros(1, 3, 8, 8).half(), ValueError, r"`x` is torch.float16, the network torch.float32"),
        (torch.zeros(1, 3, 8, 8, device="meta"), ValueError, r"`x` is on meta, the network on cpu"),
        (torch.zeros(1, 3, 8, 8).numpy(), TypeError, r"must be a tensor \[N, 3, H, W\], got a numpy.ndarray"),
        (None, TypeError, "must be a tensor"),
        (torch.zeros(3, 8, 8), ValueError, r"must have 4 dimensions \[N, C, H, W\]"),
    ],
    ids=["channels-last", "channels", "half", "device", "numpy", "None", "rank"],
)
@pytest.mark.parametrize("form", ["imagenet", "cifar"])
def test_errors_are_about_the_image(form: str, x: Any, kind: type[Exception], message: str) -> None:
    net = network() if form == "imagenet" else parnet_cifar(8).eval().deploy()
    with pytest.raises(kind, match=message):
        net(x)


def test_autocast_takes_what_it_casts() -> None:
    net = network()
    with torch.autocast("cpu", torch.bfloat16):
        assert net(X.bfloat16()).dtype == torch.bfloat16


COLLECTIVES = """
import sys, torch, torch.distributed as dist
from test_deployed_changes import X, network, layer_by_layer
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
net = network()
for collective in (
    lambda w: dist.broadcast(w, 0),
    lambda w: dist.all_reduce(w),
    lambda w: dist.send(w.clone(), 1) if rank == 0 else dist.recv(w, 0),
):
    for name in ("layers.streams_1_0.weight", "head_weight"):
        with torch.no_grad():
            w = net.get_parameter(name)
            w.mul_(1 + rank)
            before = net(X)
            collective(w)
            if rank:
                assert not torch.allclose(net(X), before, rtol=1e-3), name
            torch.testing.assert_close(net(X), layer_by_layer(net, X), rtol=1e-4, atol=1e-4)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not there")
def test_collectives_into_weights_are_seen(tmp_path: Any) -> None:
    command = [sys.executable, "-c", "import sys; sys.path[:0] = " + repr(sys.path) + COLLECTIVES]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in ranks:
        try:
            _, told = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == 0, told[-3000:]
