"""Published checkpoints, our own files, and files that are wrong."""

import argparse
import json
import os
import pickle
import time
import warnings
from pathlib import Path

import pytest
import torch
from oracle import OracleParNet, randomize
from safetensors import safe_open
from safetensors.torch import save_file

from parnet_kernels import ParNet, ParNetConfig, load_checkpoint, load_deployed, parnet_cifar, save
from parnet_kernels.checkpoint import CheckpointError, infer_config, load_model
from parnet_kernels.config import VARIANTS

CONFIG = ParNetConfig((5, 7, 6, 9), (2, 3, 2), num_classes=4)


def trained(activation: str, seed: int = 0) -> OracleParNet:
    """An independent network whose running statistics come from data."""
    torch.manual_seed(seed)
    network = OracleParNet(CONFIG.planes, CONFIG.num_blocks, CONFIG.num_classes, activation=activation)
    randomize(network, seed)
    for _ in range(10):
        network.train()(torch.randn(8, 3, 64, 64))
    return network.eval()


def published(network: torch.nn.Module, ema: torch.nn.Module | None = None, prefix: str = "") -> dict:
    """The dict that the training script's saver writes; its configurations nest the list, which makes ReLU networks."""
    branches = [["swish"]] if any(isinstance(m, torch.nn.ReLU) for m in network.modules()) else ["swish"]
    content = {
        "epoch": 3,
        "arch": "simpnet",
        "state_dict": {prefix + k: v for k, v in network.state_dict().items()},
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
        "version": 2,
        "args": argparse.Namespace(lr=0.1, additional_branches=branches, resume=None),
        "metric": 76.6,
    }
    if ema is not None:
        averaged = {k: v.float() * 0.7 if k.endswith("num_batches_tracked") else v for k, v in ema.state_dict().items()}
        content["state_dict_ema"] = averaged
    return content


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "module."])
@torch.no_grad()
def test_published_file(tmp_path: Path, activation: str, prefix: str) -> None:
    network, ema = trained(activation), trained(activation, seed=1)
    path = tmp_path / "model_best.pth.tar"
    torch.save(published(network, ema, prefix), path)
    x = torch.randn(2, 3, 64, 64)
    for flag, expected in ((False, network), (True, ema)):
        model = load_checkpoint(path, ema=flag)
        assert model.config == CONFIG.replace(activation=activation)
        assert not model.training
        assert torch.allclose(model(x), expected(x), rtol=1e-4, atol=1e-5)
    assert torch.allclose(load_model(path)(x), network(x), rtol=1e-4, atol=1e-5)


def test_dicts() -> None:
    network = trained("silu")
    for content in (published(network), network.state_dict(), {"state_dict": network.state_dict()}):
        assert load_checkpoint(content).config.planes == CONFIG.planes
    without_counters = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    load_checkpoint(without_counters)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_is_inferred_from_shapes(variant: str) -> None:
    with torch.device("meta"):
        state = ParNet(variant, num_classes=7, in_chans=4).state_dict()
    assert infer_config(state) == VARIANTS[variant].replace(num_classes=7, in_chans=4)


def test_cifar_form_is_inferred() -> None:
    model = parnet_cifar(width=4)
    assert infer_config(model.state_dict()) == model.config


def test_activation_is_cross_checked() -> None:
    silu, relu = trained("silu").state_dict(), trained("relu").state_dict()
    assert load_checkpoint(silu).config.activation == "silu"
    assert load_checkpoint(relu).config.activation == "silu"  # nothing in weights proves ReLU
    assert load_checkpoint(published(trained("relu"))).config.activation == "relu"  # the training script's options do
    assert load_checkpoint(relu, activation="relu").config.activation == "relu"
    assert load_checkpoint(published(trained("relu")), activation="silu").config.activation == "silu"
    early = parnet_cifar(8).train()
    early(torch.randn(16, 3, 32, 32))
    assert load_checkpoint(early.state_dict()).config.activation == "silu"
    with pytest.raises(CheckpointError, match="was not trained with ReLU"):
        load_checkpoint(silu, activation="relu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_checkpoint(relu, activation="silu").config.activation == "silu"
    fresh = OracleParNet(CONFIG.planes, CONFIG.num_blocks, 4).state_dict()
    assert load_checkpoint(fresh).config.activation == "silu"
    with pytest.raises(ValueError, match="`activation` must be 'silu', 'relu' or None, got 'gelu'"):
        load_checkpoint(fresh, activation="gelu")


@torch.no_grad()
def test_safetensors_of_both_forms(tmp_path: Path) -> None:
    model = load_checkpoint(trained("relu").state_dict(), activation="relu")
    deployed = model.deploy()
    x = torch.randn(1, 3, 64, 64)
    save(model, tmp_path / "training.safetensors")
    save(deployed.prepare(), tmp_path / "deployed.safetensors")
    assert torch.equal(load_checkpoint(tmp_path / "training.safetensors")(x), model(x))
    assert torch.equal(load_deployed(tmp_path / "deployed.safetensors")(x), deployed(x))
    for name in ("training", "deployed"):
        assert torch.equal(load_model(tmp_path / f"{name}.safetensors")(x), deployed(x))
    save(deployed.half(), tmp_path / "half.safetensors")
    assert load_deployed(tmp_path / "half.safetensors").head_weight.dtype == torch.float16
    with pytest.raises(CheckpointError, match=r"holds a ParNet in training form, expected the deployed form"):
        load_deployed(tmp_path / "training.safetensors")
    with pytest.raises(CheckpointError, match=r"holds a ParNet in deployed form, expected the training form"):
        load_checkpoint(tmp_path / "deployed.safetensors")
    with pytest.raises(CheckpointError, match="was saved with activation 'relu', asked for 'silu'"):
        load_checkpoint(tmp_path / "training.safetensors", activation="silu")


class Harmful:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("harm-was-done",)


def test_nothing_in_a_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Harmful()}, "zip.pth")
    Path("plain.pth").write_bytes(pickle.dumps({"state_dict": Harmful()}, protocol=2))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(CheckpointError, match=rf"cannot read {name}: it needs GLOBAL posix.mkdir, which may not"):
            load_checkpoint(name)
    assert not Path("harm-was-done").exists()


def test_wrong_files(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pth"
    torch.save(published(trained("silu")), whole)
    (tmp_path / "half.pth").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "numbers.pth")
    for name, message in {
        "half.pth": "truncated, or not a PyTorch checkpoint",
        "empty.pth": "truncated, or not a PyTorch checkpoint",
        "text.pth": "not a PyTorch checkpoint",
        "text.safetensors": "truncated, or not a safetensors file",
        "list.pth": "holds a list, expected a state dict",
        "other.pth": "is not a ParNet checkpoint: it has no entries 'inits.0",
        "numbers.pth": "holds no state dict",
    }.items():
        with pytest.raises(CheckpointError, match=f"{name}.*{message}"):
            load_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file .*none\.pth"):
        load_checkpoint(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError):
        load_deployed(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="holds no EMA weights"):
        load_checkpoint(whole, ema=True)


def test_wrong_entries() -> None:
    state = dict(trained("silu").state_dict())
    weight = state.pop("streams.1.0.block.rbr_1x1.conv.weight")
    with pytest.raises(CheckpointError, match=r"1 missing, the first is 'streams\.1\.0\.block\.rbr_1x1\.conv\.weight'"):
        load_checkpoint(state)
    state["streams.1.0.block.rbr_1x1.conv.weight"] = weight[:2]
    with pytest.raises(CheckpointError, match="1 of the wrong shape"):
        load_checkpoint(state)
    state["streams.1.0.block.rbr_1x1.conv.weight"] = weight
    state["extra.weight"] = weight
    with pytest.raises(CheckpointError, match=r"1 unexpected, the first is 'extra\.weight'"):
        load_checkpoint(state)


DENSE = "inits.0.1.block.rbr_dense.conv.weight"
BAD_ENTRIES = {
    "number as name": ({7: torch.zeros(2)}, "names of entries must be strings, got 7"),
    "0 dimensions": ({DENSE: torch.tensor(1.0)}, r"must have 4 dimensions, got shape \[\]"),
    "1 dimension": (
        {"inits.0.0.block.rbr_dense.conv.weight": torch.zeros(5)},
        r"must have 4 dimensions, got shape \[5\]",
    ),
    "0-dimensional head": ({"head.fc.weight": torch.tensor(1.0)}, "must have 2 dimensions"),
    "no planes": ({DENSE: torch.zeros(0, 5, 3, 3)}, "`planes` must"),
    "odd planes": ({"inits.2.1.block.rbr_dense.conv.weight": torch.zeros(5, 7, 3, 3)}, ""),
    "meta": ({DENSE: torch.zeros(5, 5, 3, 3, device="meta")}, f"{DENSE!r} must be a dense .* got a meta tensor"),
    "sparse": ({DENSE: torch.zeros(5, 5, 3, 3).to_sparse()}, "dense .* got torch.float32, torch.sparse_coo"),
    "complex": ({DENSE: torch.zeros(5, 5, 3, 3, dtype=torch.complex64)}, "of real values, got torch.complex64"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_bad_entries(changes: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"the given dict.*{message}"):
        load_checkpoint({**ParNet(CONFIG).state_dict(), **changes})


def test_damaged_pickles(tmp_path: Path) -> None:
    path = tmp_path / "damaged.pth"
    for content in (b"\x80\x02]R.", b"\x80\x02NNb.", b"\x80\x02}K\x01s.", b"\x80\x02K\x01Ka."):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"cannot read .*damaged\.pth"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    "config",
    [
        "",
        "{",
        "[1]",
        "{}",
        '{"planes": [4, 6, 8], "num_blocks": [1, 1], "depth": 3}',
        '{"planes": 3, "num_blocks": [1]}',
        '{"planes": [4.0, 6, 8], "num_blocks": [1, 1]}',
        '{"planes": [4, 5, 8], "num_blocks": [1, 1]}',
    ],
)
def test_bad_metadata(tmp_path: Path, config: str) -> None:
    path = tmp_path / "net.safetensors"
    for form, load in (("training", load_checkpoint), ("deployed", load_deployed)):
        save_file({"head_weight": torch.zeros(2)}, path, {"parnet_form": form, "parnet_config": config})
        with pytest.raises(CheckpointError, match=r"net\.safetensors: metadata `parnet_config` must"):
            load(path)


def test_bad_head_of_a_deployed_file(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save(ParNet(CONFIG).deploy(), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for state, message in (
        ({"other": torch.zeros(1)}, "it has no entry 'head_weight'"),
        ({"head_weight": torch.zeros(4, 9, dtype=torch.int32)}, r"'head_weight' must be .* got torch\.int32"),
    ):
        save_file(state, path, metadata)
        with pytest.raises(CheckpointError, match=message):
            load_deployed(path)


def test_save_names_the_file_that_it_cannot_write(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "net.safetensors", tmp_path):
        with pytest.raises(OSError, match=f"cannot write {path}"):
            save(ParNet(CONFIG), path)


def test_wrappers_and_places() -> None:
    model = parnet_cifar(4).eval()
    state, x = model.state_dict(), torch.randn(1, 3, 32, 32)
    average = torch.optim.swa_utils.AveragedModel(model)
    contents = [
        *(
            {prefix + k: v for k, v in state.items()}
            for prefix in ("_orig_mod.", "module._orig_mod.", "module.module.")
        ),
        *({place: state} for place in ("model", "model_state", "net")),
        {"state_dict": {**{f"model.{k}": v for k, v in state.items()}, "loss.weight": torch.ones(3)}},
        average.state_dict(),
    ]
    for content in contents:
        assert torch.equal(load_checkpoint(content)(x), model(x))
    assert torch.equal(load_checkpoint(average.state_dict(), ema=True)(x), model(x))
    assert torch.equal(load_checkpoint({"model": {}, "ema": state}, ema=True)(x), model(x))


def test_wrapped_models_are_saved_as_what_they_wrap(tmp_path: Path) -> None:
    model, x = parnet_cifar(4).eval(), torch.randn(1, 3, 32, 32)
    for wrapped in (torch.compile(model), torch.nn.DataParallel(model)):
        save(wrapped, tmp_path / "training.safetensors")
        assert torch.equal(load_checkpoint(tmp_path / "training.safetensors")(x), model(x))
    save(torch.compile(model.deploy()), tmp_path / "deployed.safetensors")
    assert torch.equal(load_deployed(tmp_path / "deployed.safetensors")(x), model.deploy()(x))
    with pytest.raises(TypeError, match="must be a ParNet, DeployedParNet or QuantizedParNet, got a Linear"):
        save(torch.nn.Linear(2, 2), tmp_path / "x.safetensors")
    model.head.fc.bias = model.combine[3].block.dense.bn.bias = torch.nn.Parameter(torch.zeros(64))
    model.head.fc.bias = torch.nn.Parameter(torch.zeros(10))
    state = model.combine[3].block.dense.bn
    state.weight = state.bias  # shared
    save(model, tmp_path / "tied.safetensors")


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_saved_files_have_the_usual_permissions_and_no_leftovers(tmp_path: Path) -> None:
    model = parnet_cifar(4)
    (tmp_path / "other").write_text("")
    save(model, tmp_path / "net.safetensors")
    assert (tmp_path / "net.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(OSError, match="folder"):
        save(model, tmp_path / "folder.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.safetensors", "net.safetensors", "other"]


@pytest.mark.parametrize(
    "changes",
    [
        {"planes": [9000] * 4},
        {"num_blocks": [3_000_000, 2, 2]},
        {"num_classes": 10**10},
        {"num_classes": 10**22},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["training", "deployed"])
def test_files_that_declare_much_are_refused_at_once(tmp_path: Path, form: str, changes: dict) -> None:
    from safetensors.torch import save_file

    model = ParNet(CONFIG).eval()
    fields = {"planes": CONFIG.planes, "num_blocks": CONFIG.num_blocks, "num_classes": 4} | changes
    state = (model.deploy() if form == "deployed" else model).state_dict()
    path = tmp_path / "net.safetensors"
    save_file(state, path, {"parnet_form": form, "parnet_config": json.dumps(fields)})
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="declares a larger network than it holds"):
        load_model(path)
    assert time.perf_counter() - start < 2


def test_dicts_that_declare_much_are_refused_at_once(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = ParNet(CONFIG).state_dict()
    start = time.perf_counter()
    for extra in ("streams.2.300000.block.x", "inits.300000.block.x"):
        with pytest.raises(CheckpointError, match="missing between"):
            load_checkpoint(state | {extra: torch.zeros(1)})
    with pytest.raises(CheckpointError, match="expanded"):
        load_checkpoint(state | {"head.fc.weight": torch.zeros(1).expand(10**9, 10**6)})
    with pytest.raises(CheckpointError, match="nested"):
        load_checkpoint(state | {"head.fc.weight": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])})
    path = tmp_path / "net.safetensors"
    save_file(state, path, {"parnet_form": "training", "parnet_config": "[" * 100_000})
    with pytest.raises(CheckpointError, match="must hold the fields"):
        load_checkpoint(path)
    assert time.perf_counter() - start < 5
