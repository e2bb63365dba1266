"""ParNet as timm's models are used: timm's own checks in our words, and what is special to ParNet."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import error, randomize
from torch import nn

from parnet_kernels import ParNet, Preprocessing, load_checkpoint, save
from parnet_kernels.config import VARIANTS, cifar_config
from parnet_kernels.deployed import DeployedParNet

timm = pytest.importorskip("timm")
parnet_timm = pytest.importorskip("parnet_kernels.timm")

TINY = {"width": 8}
NAMES = [f"parnet_{variant}" for variant in (*VARIANTS, "cifar")]


def make(**options: Any) -> Any:
    torch.manual_seed(0)
    return randomize(timm.create_model("parnet_cifar", **TINY, **options)).eval()


def test_models_are_listed() -> None:
    assert sorted(NAMES) == timm.list_models("parnet*")
    assert timm.list_models("parnet*", pretrained=True) == []


@pytest.mark.parametrize("name", NAMES)
def test_configuration_is_the_networks(name: str) -> None:
    """Names of layers, sizes and feature maps, without memory for the weights."""
    config = timm.get_pretrained_cfg(name)
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        assert model(torch.empty(1, *config.input_size)).shape == (1, config.num_classes)
        last, maps = model.forward_intermediates(torch.empty(1, *config.input_size))
    assert last.shape == (1, model.num_features, *config.pool_size)
    assert [t.shape[1] for t in maps] == [info["num_chs"] for info in model.feature_info]
    assert [config.input_size[-1] // t.shape[3] for t in maps] == [info["reduction"] for info in model.feature_info]
    weights = model.state_dict()
    assert all(f"{layer}.weight" in weights for layer in (config.classifier, *config.first_conv))
    assert all(isinstance(model.get_submodule(info["module"]), nn.Module) for info in model.feature_info)
    assert model.model.preprocessing == Preprocessing(config.input_size[-1], config.crop_pct)


def test_configurations_of_rectangular_pictures() -> None:
    for size, expected in (((3, 24, 40), (24, 40)), ((3, 24, 24), 24)):
        model = make(pretrained_cfg_overlay={"input_size": size})
        assert model.model.preprocessing == Preprocessing(expected, 1.0)


def test_every_parameter_gets_a_gradient_with_and_without_checkpointing() -> None:
    model, x = make(num_classes=42).train(), torch.randn(2, 3, 32, 32)
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    for m in (model, twin):
        m(x).square().mean().backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert a.grad is not None, name
        assert error(b.grad, a.grad) < 1e-4, name


def test_classifier_is_removed_and_replaced() -> None:
    model, x = make(), torch.randn(1, 3, 32, 32)
    assert isinstance(model.get_classifier(), nn.Linear)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    model.reset_classifier(7)
    assert (model(x).shape, model.num_classes) == ((1, 7), 7)
    assert make(num_classes=0, global_pool="")(x).shape == features.shape
    with pytest.raises(ValueError, match='`global_pool` must be "avg", or ""'):
        make(global_pool="")
    with pytest.raises(ValueError, match='`global_pool` must be "avg", or ""'):
        make(global_pool="max")


def test_options_of_timm() -> None:
    model = make(in_chans=1, num_classes=3, drop_rate=0.3, activation="relu")
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    assert (model.config.dropout, model.config.activation, model.in_chans) == (0.3, "relu", 1)


def test_deployed_form() -> None:
    """timm's function gives the deployed form: same logits, same feature maps; the original stays."""
    model, x = make(), torch.randn(2, 3, 31, 33)
    deployed = timm.utils.model.reparameterize_model(model)
    assert isinstance(deployed.model, DeployedParNet)
    assert isinstance(model.model, ParNet)
    with torch.no_grad():
        assert error(deployed(x), model(x)) < 1e-5
        assert torch.equal(deployed(x), deployed.model(x))
        for a, b in zip(*(m.forward_intermediates(x, intermediates_only=True) for m in (deployed, model)), strict=True):
            assert error(a, b) < 1e-5
    assert deployed.model.preprocessing == model.model.preprocessing
    assert isinstance(deployed.get_classifier(), nn.Identity)
    with pytest.raises(RuntimeError, match="keeps its classifier"):
        deployed.reset_classifier(3)


def test_features_only() -> None:
    for options in ({}, {"out_indices": (1, -1)}, {"out_indices": (0, 2)}):
        model, x = make(features_only=True, **options), torch.randn(2, 3, 32, 32)
        maps = model(x)
        assert [t.shape[1] for t in maps] == model.feature_info.channels()
        assert [32 // t.shape[3] for t in maps] == model.feature_info.reduction()
        folded = timm.utils.model.reparameterize_model(model)
        with torch.no_grad():
            assert all(error(a, b) < 1e-5 for a, b in zip(folded(x), maps, strict=True))


def test_feature_maps_are_computed_no_further_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make(), torch.randn(1, 3, 32, 32)
    called: list[str] = []
    run = parnet_timm.TimmParNet._layer

    def counted(self: Any, layer: Any, *rest: Any) -> Any:
        called.append(layer.name)
        return run(self, layer, *rest)

    monkeypatch.setattr(parnet_timm.TimmParNet, "_layer", counted)
    model.forward_intermediates(x, indices=[0], intermediates_only=True)
    assert called == ["inits.0.0"]


def test_layer_decay_groups() -> None:
    from timm.models._manipulate import group_parameters

    model = make()
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == {name for name, _ in model.named_parameters()}
    depth = [
        groups[f"model.{name}"]
        for name in (
            "inits.0.0.block.rbr_dense.conv.weight",
            "inits.0.1.block.rbr_dense.conv.weight",
            "streams.2.0.block.rbr_dense.conv.weight",
            "combine.0.b1.weight",
            "combine.3.block.dense.conv.weight",
            "head.fc.weight",
        )
    ]
    assert depth == sorted(set(depth))
    assert groups["model.combine.0.b1.weight"] == groups["model.combine.2.block.rbr_dense.conv.weight"]
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert sorted(set(coarse.values())) == [0, 1, 2, 3]


def test_pretrained_says_where_weights_are() -> None:
    with pytest.raises(RuntimeError, match=r"publishes no weights.*imankgoyal/NonDeepNetworks.*file="):
        timm.create_model("parnet_s", pretrained=True)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_weights_of_a_file(ending: str, tmp_path: Path) -> None:
    """A training checkpoint, with other classes and channels than asked for; and timm's weights, read by us."""
    source, path = randomize(ParNet(cifar_config(8))).eval(), tmp_path / f"net{ending}"
    if ending == ".pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, path)
    else:
        save(source, path)
    x = torch.randn(1, 3, 32, 32)
    overlay = {"file": str(path)}
    model = make_from(overlay)
    assert torch.equal(model(x), source(x))
    assert torch.equal(make_from(overlay, num_classes=3).forward_features(x), source.forward_features(x))
    assert make_from(overlay, in_chans=1)(x[:, :1]).shape == (1, 10)
    assert torch.equal(load_checkpoint(model.state_dict())(x), source(x))


def make_from(overlay: dict[str, Any], **options: Any) -> Any:
    return timm.create_model("parnet_cifar", pretrained=True, pretrained_cfg_overlay=overlay, **TINY, **options).eval()


def test_traced_and_fx() -> None:
    """Tracing works; scripting does not, since the layers are a graph that Python walks by name."""
    model, x = make(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
        assert torch.equal(torch.jit.trace(model, x)(x), model(x))
    with pytest.raises(ValueError, match="type annotation"):
        torch.jit.script(model)
