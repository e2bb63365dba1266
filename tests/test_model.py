"""The training form: the published names and counts, and an independent implementation's results."""

import pytest
import torch
from oracle import OracleParNet, error, randomize
from torch import nn

from parnet_kernels import DeployedParNet, ParNet, ParNetConfig, parnet_cifar, parnet_l, parnet_m, parnet_s, parnet_xl
from parnet_kernels.config import VARIANTS, levels

TINY = ((5, 7, 6, 9), (2, 3, 2))
TWO_STREAMS = ((3, 4, 5), (2, 2))
ONE_STREAM = ((5, 9), (3,))
FOUR_STREAMS = ((4, 5, 6, 8, 7), (1, 2, 3, 2))


@pytest.mark.parametrize(
    ("make", "parameters", "folded"),
    [(parnet_s, 20_931, 19_129), (parnet_m, 38_953, 35_577), (parnet_l, 60_180, 54_915), (parnet_xl, 93_176, 84_963)],
    ids=["s", "m", "l", "xl"],
)
def test_parameter_counts(make, parameters: int, folded: int) -> None:
    with torch.device("meta"):
        model = make()
    assert round(sum(p.numel() for p in model.parameters()) / 1000) == parameters
    assert len(model.state_dict()) == 378
    with torch.device("meta"):
        deployed = DeployedParNet(model.config)
    assert round(sum(b.numel() for b in deployed.parameters()) / 1000) == folded


@pytest.mark.parametrize("variant", VARIANTS)
def test_depth_is_twelve(variant: str) -> None:
    assert len(levels(VARIANTS[variant])) + 1 == 12


def test_state_dict_names() -> None:
    """Every name of the published checkpoints (378 of them), built here from their grammar."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    streams = {f"streams.{s}.{i}" for s, n in enumerate((4, 5, 5)) for i in range(n)}
    stride_2 = {"inits.0.0", "inits.0.1", "inits.1", "inits.2", "downsamples_2.0", "downsamples_2.1.2", "combine.3"}
    names = {"head.fc.weight", "head.fc.bias"}
    for block in streams | stride_2 | {"combine.2"}:
        point = "rbr_1x1.1" if block in stride_2 else "rbr_1x1"
        names |= {
            f"{block}.block.{n}" for n in ("rbr_dense.conv.weight", f"{point}.conv.weight", "se.cvsig.conv.weight")
        }
        names |= {f"{block}.block.{branch}.bn.{n}" for branch in ("rbr_dense", point) for n in norm}
    names |= {f"{block}.block.rbr_identity.{n}" for block in streams for n in norm}
    names |= {f"{m}.0.{b}.{n}" for m in ("downsamples_2.1", "combine") for b in ("b1", "b2") for n in norm}
    assert set(parnet_s().state_dict()) == names


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("shape", [TINY, ONE_STREAM, TWO_STREAMS, FOUR_STREAMS], ids=["3 streams", "1", "2", "4"])
def test_equals_independent_implementation(shape, activation: str) -> None:
    """Outputs in evaluation and training, every gradient and the running statistics, in float64."""
    torch.manual_seed(0)
    planes, num_blocks = shape
    oracle = randomize(OracleParNet(planes, num_blocks, 6, activation=activation), hard=True).double()
    model = ParNet(ParNetConfig(planes, num_blocks, num_classes=6, activation=activation)).double()
    model.load_state_dict(oracle.state_dict(), strict=True)
    x = torch.randn(3, 3, 70, 67, dtype=torch.float64)
    with torch.no_grad():
        assert error(model.eval()(x), oracle.eval()(x)) <= 1e-13
    pairs = []
    for network in (model.train(), oracle.train()):
        xi = x.clone().requires_grad_()
        y = network(xi)
        y.square().sum().backward()
        pairs.append({"output": y, "input": xi.grad, **{n: p.grad for n, p in network.named_parameters()}})
    assert pairs[0].keys() == pairs[1].keys()
    for name, value in pairs[0].items():
        scale = pairs[1][name].abs().max().clamp_min(1e-3)  # a gradient through γ = 0 is zero but for rounding
        assert (value - pairs[1][name]).abs().max() <= 1e-10 * scale, name
    for name, buffer in oracle.named_buffers():
        assert torch.allclose(model.get_buffer(name), buffer, rtol=1e-13, atol=0), name


def test_variants_at_full_size_equal_independent_implementation() -> None:
    torch.manual_seed(0)
    config = VARIANTS["s"]
    oracle = randomize(OracleParNet(config.planes, config.num_blocks, 1000)).eval()
    model = parnet_s().eval()
    model.load_state_dict(oracle.state_dict(), strict=True)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert error(model(x), oracle(x)) <= 1e-5


def test_classifier_interface() -> None:
    model = parnet_cifar(width=4, num_classes=7).eval()
    x = torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 8, 8)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert torch.equal(model.forward_head(features), model(x))
    assert isinstance(model.get_classifier(), nn.Linear)
    model.reset_classifier(3)
    assert (model.num_classes, model(x).shape, model.deploy()(x).shape) == (3, (2, 3), (2, 3))
    model.reset_classifier(0)
    assert model(x).shape == model.deploy()(x).shape == (2, model.num_features)


def test_in_chans_and_dropout() -> None:
    model = ParNet("s", in_chans=4, num_classes=5, dropout=0.5)
    assert model.inits[0][0].block.rbr_dense.conv.in_channels == 4
    pooled = torch.ones(1, model.num_features, 2, 2)
    assert (model.train().forward_head(pooled, pre_logits=True) == 0).any()
    assert (model.eval().forward_head(pooled, pre_logits=True) == 1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"planes": (4,)}, "`planes` must name at least 1 stream"),
        ({"planes": (4, 6, 5, 8)}, "`planes` must be even"),
        ({"num_blocks": (1, 2)}, "`num_blocks` must have 3 entries"),
        ({"num_blocks": (0, 2, 2)}, "`num_blocks`"),
        ({"activation": "gelu"}, "`activation` must be 'silu' or 'relu', got 'gelu'"),
        ({"num_classes": -1}, "`num_classes`"),
        ({"in_chans": 0}, "`in_chans`"),
        ({"dropout": 1.0}, "`dropout`"),
        ({"stem_stride": 3}, "`stem_stride`"),
    ],
    ids=str,
)
def test_impossible_configurations(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParNet("s", **changes)


def test_unknown_variant() -> None:
    with pytest.raises(ValueError, match=r"`variant` must be one of \['s', 'm', 'l', 'xl'\].*got 'xxl'"):
        ParNet("xxl")
