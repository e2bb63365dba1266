"""Deployment folds what the next forward in evaluation would compute, and refuses, with its name, what cannot be."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from parnet_kernels import ParNet, ParNetConfig
from parnet_kernels.evaluated import FoldError

CONFIG = ParNetConfig((8, 12, 16, 24), (2, 2, 2), num_classes=5)
X = torch.randn(2, 3, 33, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PLACES = (
    "inits.0.0.block.rbr_dense.conv",
    "inits.0.1.block.rbr_1x1.1.conv",
    "streams.1.0.block.se.cvsig.conv",
    "combine.2.block.rbr_dense.conv",
    "head.fc",
)


def trained(config: ParNetConfig = CONFIG) -> ParNet:
    torch.manual_seed(0)
    model = ParNet(config).double().train()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_()
        model(torch.randn(4, 3, 32, 32, dtype=torch.float64))
    return model


def step(model: nn.Module) -> None:
    """One of an optimiser, as in training; no forward follows."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(X).square().mean().backward()
    optimizer.step()


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def prune_twice(m: nn.Module, name: str) -> None:
    prune.random_unstructured(m, name, 0.3)
    prune.l1_unstructured(m, name, 0.4)


def old(method: Callable[..., object]) -> Callable[[nn.Module, str], object]:
    def apply(m: nn.Module, name: str) -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return method(m, name)

    return apply


def normed_then_pruned(m: nn.Module, name: str) -> None:
    old(nn.utils.weight_norm)(m, name)
    prune.random_unstructured(m, name + "_v", 0.3)


METHODS: dict[str, Callable[[nn.Module, str], object]] = {
    "pruning": lambda m, name: prune.l1_unstructured(m, name, 0.5),
    "structured pruning": lambda m, name: prune.ln_structured(m, name, 0.5, n=2, dim=0),
    "pruning twice": prune_twice,
    "weight norm": parametrizations.weight_norm,
    "old weight norm": old(nn.utils.weight_norm),
    "old weight norm, pruned": normed_then_pruned,
    "spectral norm": parametrizations.spectral_norm,
    "old spectral norm": old(nn.utils.spectral_norm),
    "parametrization": lambda m, name: parametrize.register_parametrization(m, name, Doubled()),
}


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_made_at_each_forward(method: str) -> None:
    model = trained()
    for place in PLACES:
        METHODS[method](model.get_submodule(place), "weight")
    step(model)
    before = copy.deepcopy(model.state_dict())
    deployed = model.deploy()
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items()), "deploy changed the model"
    assert all(m.training for m in model.modules())
    with torch.no_grad():
        found, expected = deployed(X), model.eval()(X)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_pruned_norms() -> None:
    model = trained()
    for name in ("streams.0.0.block.rbr_identity", "combine.0.b1", "downsamples_2.1.0.b2"):
        prune.random_unstructured(model.get_submodule(name), "weight", 0.5)
    step(model)
    found = model.deploy()(X)
    expected = model.eval()(X)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


NORMS = [
    "inits.0.0.block.rbr_dense.bn",
    "inits.1.block.rbr_1x1.1.bn",
    "streams.0.0.block.rbr_identity",
    "downsamples_2.1.0.b1",
    "combine.0.b2",
]


@pytest.mark.parametrize("kind", ["identity", "no affine", "synchronised"])
def test_norms_of_other_kinds(kind: str) -> None:
    model = trained()
    for name in NORMS:
        c = model.get_submodule(name).num_features
        made = nn.BatchNorm2d(c, affine=False) if kind == "no affine" else nn.SyncBatchNorm(c)
        replace(model, name, nn.Identity() if kind == "identity" else made.double())
    if kind != "synchronised":  # which trains on GPUs only
        with torch.no_grad():
            model.train()(X)
    found, expected = model.deploy()(X), model.eval()(X)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_convolutions_with_a_bias_and_a_classifier_without() -> None:
    model = trained()
    for name in ("inits.0.1.block.rbr_dense.conv", "combine.3.block.rbr_1x1.1.conv"):
        m = model.get_submodule(name)
        m.bias = nn.Parameter(torch.randn(m.out_channels, dtype=torch.float64))
    model.head.fc = nn.Linear(24, 5, bias=False).double()
    found, expected = model.deploy()(X), model.eval()(X)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


class Low(nn.Conv2d):
    """As a LoRA library's convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def without_statistics(model: nn.Module) -> None:
    replace(model, "combine.0.b1", nn.BatchNorm2d(16, track_running_stats=False).double())


def hook(*_: object) -> None: ...


REFUSED: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "no statistics": (without_statistics, r"`combine\.0\.b1` has no running statistics"),
    "group norm": (
        lambda m: replace(m, NORMS[0], nn.GroupNorm(1, 8)),
        r"`inits\.0\.0\.block\.rbr_dense\.bn` is a GroupNorm, not a _?BatchNorm",
    ),
    "other channels": (lambda m: replace(m, NORMS[0], nn.BatchNorm2d(9)), r"rbr_dense\.bn` has 9 channels, not 8"),
    "wrapped": (
        lambda m: replace(m, PLACES[3], nn.Sequential(m.get_submodule(PLACES[3]))),
        r"`combine\.2\.block\.rbr_dense\.conv` is a Sequential, not a Conv2d",
    ),
    "subclass": (lambda m: replace(m, PLACES[0], Low(3, 8, 3, 2, 1)), r"is a Low with a `forward` of its own"),
    "dilated": (
        lambda m: replace(m, PLACES[3], nn.Conv2d(32, 16, 3, padding=1, dilation=2, groups=2)),
        r"is another convolution than the configuration says",
    ),
    "gate with a bias": (
        lambda m: replace(m, PLACES[2], nn.Conv2d(12, 12, 1).double()),
        r"`streams\.1\.0\.block\.se\.cvsig\.conv` has a bias",
    ),
    "no skip": (
        lambda m: setattr(m.get_submodule("streams.1.0.block"), "rbr_identity", None),
        r"`streams\.1\.0\.block` folds to",
    ),
    "classifier": (lambda m: replace(m, "head.fc", nn.Linear(24, 1)), r"`head\.fc` maps 24 to 1 features"),
    "no classifier": (lambda m: replace(m, "head.fc", nn.Identity()), r"`head\.fc` is a Identity, not a Linear"),
    "pooling": (
        lambda m: replace(m, "inits.0.0.block.rbr_1x1.0", nn.MaxPool2d(2)),
        r"`inits\.0\.0\.block\.rbr_1x1` is a Sequential, not average pooling",
    ),
    "gate": (
        lambda m: replace(m, "inits.1.block.se", nn.Identity()),
        r"`inits\.1\.block\.se` is a Identity, not a Gate",
    ),
    "forward hook": (
        lambda m: m.get_submodule("streams.0.0").register_forward_hook(hook),
        r"`streams\.0\.0` has a hook, hook",
    ),
    "pre-hook": (lambda m: m.get_submodule(PLACES[0]).register_forward_pre_hook(hook), "has a hook"),
    "patched": (
        lambda m: setattr(m.get_submodule(NORMS[0]), "forward", lambda x: 2 * x),
        r"rbr_dense\.bn` has another `forward`",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_folded_form_is_named(what: str) -> None:
    model = trained()
    change, message = REFUSED[what]
    change(model)
    with pytest.raises(FoldError, match=message):
        model.deploy()
