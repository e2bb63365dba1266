"""Tools that take modules apart, count them, average them or move them, on both forms of the network."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import OPERATORS, arguments
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

from parnet_kernels import DeployedParNet, ParNet, ParNetConfig, load_checkpoint, load_deployed, load_model, ops, save

CONFIG = ParNetConfig((8, 12, 16, 24), (2, 2, 2), num_classes=5)
X = torch.randn(2, 3, 33, 40, generator=torch.Generator().manual_seed(0))


def trained() -> ParNet:
    torch.manual_seed(0)
    model = ParNet(CONFIG).train()
    with torch.no_grad():
        model(torch.randn(4, 3, 32, 32))
    return model.eval()


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def flops(call: object, backend: str) -> int:
    with FlopCounterMode(display=False) as counter, ops.use_backend(backend):
        call()  # type: ignore[operator]
    return counter.get_total_flops()


@pytest.mark.parametrize("op", OPERATORS)
def test_flops_of_an_operator_are_those_of_its_parts(op: str) -> None:
    from parnet_kernels import reference

    args, options = arguments(op, 3, 5, 8, (7, 6))
    found = flops(lambda: getattr(ops, op)(*args, **options), "reference")
    assert found == flops(lambda: getattr(reference, op)(*args, **options), "reference") > 0
    assert found == flops(lambda: getattr(torch.ops.parnet, op)(*args, **options), "reference")


def test_flops_of_a_network() -> None:
    model = trained()
    network = model.deploy()
    with torch.no_grad():
        network(X)  # packed, before the counter looks
        found = flops(lambda: network(X), "reference")
    expected = 0
    for layer in network.operators():
        k, c = layer.weight.shape[:2]
        expected += 2 * 2 * k * c  # the gate of two images
    size = {"image": (33, 40)}
    for level in network.levels():
        for layer in level:
            size[layer.name] = tuple(-(-n // layer.stride) for n in size[layer.inputs[0]])  # type: ignore[assignment]
            h, w = size[layer.name]
            expected += 2 * 2 * h * w * layer.out_channels * layer.in_channels * 9
    assert found == expected + 2 * 2 * 24 * 5


def test_the_counter_is_imported_by_those_who_use_it() -> None:
    """It imports triton. Whoever imports it first, counter or package, the operators are counted."""
    count = (
        "x = torch.randn(1, 4, 5, 5); w = torch.randn(4, 4, 3, 3), torch.randn(4), torch.randn(4, 4)\n"
        "with FlopCounterMode(display=False) as c: parnet_kernels.ops.downsample_se(x, *w, stride=1)\n"
        "assert c.get_total_flops() == 2 * 25 * 4 * 36 + 2 * 16, c.get_total_flops()\n"
    )
    package = "import torch, sys, parnet_kernels; assert 'torch.utils.flop_counter' not in sys.modules\n"
    counter = "from torch.utils.flop_counter import FlopCounterMode\n"
    for code in (package + counter + count, counter + "import torch, parnet_kernels\n" + count):
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("form", ["training", "evaluation", "deployed"])
def test_symbolic_trace(form: str) -> None:
    model = trained()
    module: nn.Module = model.deploy() if form == "deployed" else model.train(form == "training")
    traced = torch.fx.symbolic_trace(copy.deepcopy(module))
    with torch.no_grad():
        same(traced(X), module(X))


def test_weights_of_the_deployed_form_are_parameters_without_gradients() -> None:
    network = trained().deploy()
    parameters = dict(network.named_parameters())
    assert not list(network.buffers())
    assert parameters.keys() == network.state_dict().keys()
    assert not any(p.requires_grad for p in parameters.values())
    assert next(network.parameters()).dtype == torch.float32
    assert next(network.half().parameters()).dtype == torch.float16


def test_averages_copies_and_pickles() -> None:
    network = trained().deploy()
    expected = network(X)
    average = AveragedModel(network)
    other = copy.deepcopy(network)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(3)
    average.update_parameters(network)
    average.update_parameters(other)
    for p, q in zip(average.module.parameters(), network.parameters(), strict=True):
        same(p, 2 * q)
    assert not torch.allclose(average(X), expected)
    same(average(X), average.module._layer_by_layer(X, "logits"))  # of the averages, not of what was packed
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(X), expected)


@pytest.mark.parametrize("method", [prune.l1_unstructured, prune.random_unstructured])
def test_pruning_the_deployed_form(method: object) -> None:
    network = trained().deploy()
    before = network(X)
    method(network.layers["combine_3"], "weight", amount=0.5)  # type: ignore[operator]
    assert not torch.allclose(network(X), before)
    prune.remove(network.layers["combine_3"], "weight")
    assert (network.layers["combine_3"].weight == 0).float().mean() >= 0.5
    same(network(X), network._layer_by_layer(X, "logits"))


def test_the_meta_device(tmp_path: Path) -> None:
    """Construction and deployment keep to it; what is read from a file has values."""
    model = trained()
    network = model.deploy()
    expected = network(X)
    save(model, tmp_path / "training.safetensors")
    save(network, tmp_path / "deployed.safetensors")
    with torch.device("meta"):
        empty, training = DeployedParNet(CONFIG), ParNet(CONFIG)
        assert training.deploy()(torch.empty(1, 3, 32, 32)).shape == (1, 5)
        same(load_checkpoint(tmp_path / "training.safetensors").eval()(X), model(X))
        same(load_model(tmp_path / "training.safetensors")(X), expected)
        assert torch.equal(load_model(tmp_path / "deployed.safetensors")(X), expected)
        assert torch.equal(load_deployed(tmp_path / "deployed.safetensors")(X), expected)
    assert next(empty.parameters()).is_meta
    empty.load_state_dict(network.state_dict(), assign=True)
    assert torch.equal(empty(X), expected)
    assert not next(empty.parameters()).requires_grad
    moved = DeployedParNet(CONFIG).to("meta").to_empty(device="cpu")
    moved.load_state_dict(network.state_dict())
    assert torch.equal(moved(X), expected)
