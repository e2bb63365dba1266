"""`parnet train`: settings, recipes, what it writes, starting from other weights."""

import csv
import itertools
import json
import tarfile
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from parnet_kernels import ParNet, ParNetConfig, Preprocessing, load_checkpoint, load_deployed, save
from parnet_kernels.app.cli import app
from parnet_kernels.app.images import fitted, normalised, pixels_of
from parnet_kernels.checkpoint import read_metadata
from parnet_kernels.train import augmentation, finish, state
from parnet_kernels.train.augmentation import Augmentation
from parnet_kernels.train.batches import Feed, training_parts, validation_parts
from parnet_kernels.train.learner import Learner
from parnet_kernels.train.logs import Logs
from parnet_kernels.train.loop import Run, Stopped
from parnet_kernels.train.ranks import Ranks
from parnet_kernels.train.settings import FIELDS, RECIPES, Settings, read_yaml, settings, written
from parnet_kernels.train.sources import pictures

pytest.importorskip("kornia")
pytest.importorskip("yaml")

ONE = Ranks(0, 1, torch.device("cpu"))


class Quiet:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.rows: list[dict[str, float]] = []
        self.stop_at = -1

    def say(self, text: str) -> None:
        self.said.append(text)

    def step(self, done: int, total: int, epoch: int, loss: float, rate: float) -> None:
        if done == self.stop_at:
            raise KeyboardInterrupt

    def epoch(self, row: dict[str, float]) -> None:
        self.rows.append(row)


def draw(folder: Path, classes: int = 3, train: int = 9, val: int = 3, size: int = 12) -> Path:
    """Pictures whose class is their colour; of several sizes."""
    noise = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for c in range(classes):
            (folder / part / f"class {c}").mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 90, (size + i % 3, size, 3), dtype=np.uint8)
                pixels[..., c % 3] += 120
                Image.fromarray(pixels).save(folder / part / f"class {c}" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("pictures"))


def tiny(data: object, out: Path, **more: object) -> Settings:
    """A run of a second."""
    given = {"recipe": "cifar", "data": str(data), "out": str(out), "size": 12, "pad": 1, "batch": 8}
    given |= {} if "init" in more else {"width": 4}
    return settings({**given, "epochs": 3, "warmup": 0.5, "log_every": 1, "tensorboard": False, "threads": 1, **more})


def trained(chosen: Settings, resume: bool = False, stop_at: int = -1) -> tuple[Run, Quiet]:
    quiet = Quiet()
    quiet.stop_at = stop_at
    with mock.patch.object(Logs, "draw"):  # takes as long as the run
        run = Run(chosen, ONE, quiet, resume)
        run()
    return run, quiet


def left(folder: Path) -> dict[str, object]:
    """What must be equal after a resumed run and one that was not cut: every tensor, text and number but for times."""
    found: dict[str, object] = {}
    for path in folder.glob("*.safetensors"):
        metadata = dict(read_metadata(path))
        if "parnet_training" in metadata:  # its digest of the network is of bytes, which the order of texts changes
            metadata["parnet_training"] = {**json.loads(metadata["parnet_training"]), "network": None}
        found[path.name] = {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}, metadata
    for name in ("steps.csv", "epochs.csv"):
        with (folder / name).open() as file:
            found[name] = [{**row, "images_per_second": 0, "seconds": 0} for row in csv.DictReader(file)]
    return found


def test_files_of_a_run(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    out = tmp_path / "out"
    command = ["train", str(data), "--recipe", "cifar", "--width", "4", "--size", "12", "--pad", "1", "--batch", "8"]
    command += [
        "--epochs",
        "12",
        "--threads",
        "1",
        "--lr-base",
        "1.0",
        "--log-every",
        "1",
        "--out",
        str(out),
        "--deploy",
        "--ema",
        "0.8",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "27 training and 9 validation pictures, 3 classes" in result.output
    assert "epoch 12: loss" in result.output
    assert "trained and deployed agree\t9 of 9" in result.output
    for name in ("best", "last"):
        network = load_checkpoint(out / f"{name}.safetensors")
        assert network.class_names == ("class 0", "class 1", "class 2")
        assert network.preprocessing == Preprocessing(size=12, crop=1.0)
        assert len(list(out.glob(f"{name}.state-*.safetensors"))) == 1
    assert load_deployed(out / "deployed.safetensors").class_names == network.class_names
    rows = list(csv.DictReader((out / "epochs.csv").open()))
    assert [int(row["epoch"]) for row in rows] == [*range(1, 13)]
    assert max(float(row["top1"]) for row in rows) >= 0.9
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert len(list(csv.DictReader((out / "steps.csv").open()))) == 36
    assert Image.open(out / "curve.png").size == (1000, 400)
    assert next((out / "tensorboard").iterdir()).stat().st_size > 1000
    assert read_yaml(out / "run.yaml")["batch"] == 8
    picture, network = str(data / "val" / "class 1" / "0.png"), str(out / "deployed.safetensors")
    predicted = CliRunner().invoke(app, ["predict", picture, "--checkpoint", network])
    assert "class 1" in predicted.stdout.splitlines()[1], predicted.output


def test_folder_zip_and_tar_are_one_data_set(data: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z, tarfile.open(tmp_path / "a.tar", "w") as t:
        for path in sorted(data.rglob("*.png"), reverse=True):
            name = Path("around") / path.relative_to(data)  # a folder around all is passed over
            z.write(path, name)
            t.add(path, str(name))
    found = {}
    for source in (data, tmp_path / "a.zip", tmp_path / "a.tar"):
        run = Run(tiny(source, tmp_path / source.suffix), ONE, Quiet())
        feed = Feed(run._training._loader.dataset, workers=2 if source == data else 0)  # type: ignore[arg-type]
        parts = training_parts(len(run.data.train), 0, 1, 0, 8, 0, 1, 1)
        found[source] = [(b.x, b.y) for b in feed.read(parts)]
        assert run.data.class_names == ("class 0", "class 1", "class 2")
    first, *others = found.values()
    for other in others:
        for (x, y), (x2, y2) in zip(first, other, strict=True):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)


def test_classes_without_parts_are_split(tmp_path: Path) -> None:
    root = draw(tmp_path / "d", train=10) / "train"
    found = pictures(str(root), 0.3, 0, seed=0)
    assert (len(found.train), len(found.validation)) == (21, 9)
    assert not {s.name for s in found.train} & {s.name for s in found.validation}
    assert pictures(str(root), 0.3, 0, seed=0)[2:4] == found[2:4]
    assert pictures(str(root), 0.3, 0, seed=1)[2:4] != found[2:4]
    assert len(pictures(str(root), 0.3, 2, seed=0).train) == 6
    assert pictures(str(root), 0.0, 0, seed=0).warnings[0].startswith("there are no pictures for validation")


def test_ranks_share_the_batches_of_one() -> None:
    """Of 2 ranks and of parts, every step has the pictures that one process takes; validation has each picture once."""
    one = [numbers for _, numbers in training_parts(50, 3, 1, 2, 12, 0, 1, 1)]
    for world, accumulate in ((2, 1), (1, 3), (2, 3)):
        ranks = [[*training_parts(50, 3, 1, 2, 12, rank, world, accumulate)] for rank in range(world)]
        for step, expected in enumerate(one):
            parts = [r[step * accumulate + part][1] for part in range(accumulate) for r in ranks]
            assert [n for part in parts for n in part] == expected
    found = [n for rank in range(3) for _, numbers in validation_parts(20, 4, rank, 3) for n in numbers]
    assert sorted(found) == [*range(20)]


def test_other_weights_to_start_from(data: Path, tmp_path: Path) -> None:
    """A published checkpoint has other classes: its classifier is replaced, the rest is trained on."""
    theirs = ParNet(ParNetConfig((4, 6, 8, 8), (2, 2, 2), num_classes=7, activation="relu"))
    torch.save(
        {"state_dict": theirs.state_dict(), "args": {"additional_branches": [["swish"]]}}, tmp_path / "theirs.pth"
    )
    trained(tiny(data, tmp_path / "a", init=str(tmp_path / "theirs.pth"), lr_base=1e-6, lr_min=0.0, epochs=1))
    network = load_checkpoint(tmp_path / "a" / "last.safetensors")
    assert network.config == theirs.config.replace(num_classes=3)
    before = theirs.state_dict()["streams.1.0.block.rbr_dense.conv.weight"]
    after = network.state_dict()["streams.1.0.block.rbr_dense.conv.weight"]
    assert 0 < (after - before).abs().max() < 1e-4
    again = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "a" / "run.yaml"), "--resume"])
    assert again.exit_code == 0, again.output
    assert "the run was complete" in again.output
    # Of a network with the same classes, the classifier is kept.
    again, _ = trained(
        tiny(data, tmp_path / "b", init=str(tmp_path / "a" / "last.safetensors"), lr_base=1e-6, epochs=1)
    )
    assert (again.learner.model.head.fc.weight - network.head.fc.weight).abs().max() < 1e-4
    with pytest.raises(ValueError, match="`width` is that of the network that `init` names"):
        settings({"data": str(data), "init": "x.pth", "width": 4})


def test_preprocessing_of_other_weights_is_kept(data: Path, tmp_path: Path) -> None:
    model = ParNet(ParNetConfig((4, 6), (2,), num_classes=2))
    model.preprocessing = Preprocessing(64, 1.0, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5), color="bgr")
    save(model, tmp_path / "a.safetensors")
    run = Run(tiny(data, tmp_path / "out", init=str(tmp_path / "a.safetensors")), ONE, Quiet())
    assert run.preprocessing == model.preprocessing.replace(size=12)
    x = run._training._loader.dataset[0, [0]].x[0]  # type: ignore[index]
    name = run.data.train[0].name
    pixels = np.asarray(Image.open(data / name)).astype(float) / 255
    assert name.startswith("train/class 0")
    red = x[2] * 0.5 + 0.3  # bgr: the class's colour comes last
    assert red[2:-2, 2:-2].mean() == pytest.approx(pixels[..., 0].mean(), abs=0.05)
    with pytest.raises(ValueError, match="`color` gray makes 1 channels, the network takes 3"):
        Run(tiny(data, tmp_path / "c", init=str(tmp_path / "a.safetensors"), color="gray"), ONE, Quiet())


@pytest.mark.parametrize("which", ["kornia", "torchvision"])
def test_augmentation(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By both libraries: without random steps it is what `predict` does; a flip is one; colours stay in their range."""
    if which == "torchvision" and augmentation.library() != which:
        pytest.skip("torchvision does not import")
    monkeypatch.setattr(augmentation, "library", lambda: which)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)
    image, p = Image.fromarray(pixels), Preprocessing(32, 1.0)
    plain = {"data": "x", "size": 32, "crop_scale": 0.0, "randaugment": 0, "erase": 0.0}

    def made(picture: Image.Image = image, of: Preprocessing = p, **more: object) -> torch.Tensor:
        torch.manual_seed(0)
        return Augmentation(settings({**plain, **more}), of)(picture, "x")

    whole = normalised([fitted(pixels_of(image, p), p, "x")], p)[0]
    assert torch.allclose(made(flip=0.0), whole, atol=1e-5)
    assert torch.allclose(made(flip=1.0), whole.flip(2), atol=1e-5)
    crop = made(flip=0.0, pad=4)
    zero = -torch.tensor(p.mean) / torch.tensor(p.std)
    padded = zero[:, None, None].expand(3, 40, 40).clone()
    padded[:, 4:36, 4:36] = whole
    assert any(torch.allclose(crop, padded[:, i : i + 32, j : j + 32], atol=1e-5) for i in range(9) for j in range(9))
    low, high = (torch.tensor([v - m for m in p.mean]) / torch.tensor(p.std) for v in (0, 1))
    for seed in range(20):
        torch.manual_seed(seed)
        x = Augmentation(settings({"data": "x", "size": 32, "erase": 0.0}), p)(image, "x")
        assert x.shape == (3, 32, 32)
        assert (x.amin((1, 2)) >= low - 1e-5).all()
        assert (x.amax((1, 2)) <= high + 1e-5).all()
    erased = made(flip=0.0, erase=1.0)
    share = ((erased - whole).abs() > 1e-3).any(0).float().mean()
    assert 0.01 < share < 0.5
    grey = Preprocessing(32, 1.0, mean=(0.0,), std=(1.0,), color="gray")
    x = made(image.convert("L"), grey, color="gray", randaugment=9, crop_scale=0.5)
    assert x.shape == (1, 32, 32)
    assert 0 <= x.min() <= x.max() <= 1


@pytest.mark.parametrize("streams", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_numbers_of_streams(streams: int, data: Path, tmp_path: Path) -> None:
    run, _ = trained(tiny(data, tmp_path / "out", streams=streams, epochs=1, deploy=True, activation="relu"))
    network = load_deployed_of(run)
    assert network.config.planes == (*(4, 8, 16, 32)[:streams], 64)
    assert network.config.activation == "relu"


def test_comparison_is_of_all_classes(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = trained(tiny(data, tmp_path / "out", epochs=1))
    seen: list[str] = []
    read = run.data.reader.read
    spy = mock.Mock(wraps=run.data.reader, read=lambda name: seen.append(name) or read(name))
    monkeypatch.setattr(finish, "PICTURES", 4)
    found = finish.deploy(run.folder, run.data._replace(reader=spy))
    assert (found.pictures, found.passed) == (3, True)
    assert {name.split("/")[1] for name in seen} == set(run.data.class_names)


def load_deployed_of(run: Run):
    assert finish.deploy(run.folder, run.data).passed
    return load_deployed(run.folder / "deployed.safetensors")


def test_weight_decay_is_of_weights_alone(data: Path, tmp_path: Path) -> None:
    run = Run(tiny(data, tmp_path), ONE, Quiet())
    decayed, others = run.learner.optimizer.param_groups
    assert decayed["weight_decay"] == 5e-4
    assert others["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"])
    assert {id(p) for p in others["params"]} == {
        id(p)
        for name, p in run.learner.model.named_parameters()
        if ".bn." in name or name.endswith("bias") or p.ndim <= 1
    }


def test_average_of_weights(data: Path, tmp_path: Path) -> None:
    """After step t, the copy is d·copy + (1 − d)·weights, d = min(ema, (1 + t)/(10 + t)); statistics too."""
    run = Run(tiny(data, tmp_path, ema=0.5, epochs=1, warmup=0.0), ONE, Quiet())
    follow, expected = run.learner.follow, {k: v.double().clone() for k, v in run.learner.shadow.state_dict().items()}

    def checked(decay: float) -> None:
        follow(decay)
        assert decay == min(0.5, (1 + run.done) / (10 + run.done))
        for name, t in run.learner.model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * t.double() if t.is_floating_point() else t.double()

    run.learner.follow = checked  # type: ignore[method-assign]
    run()
    for name, t in run.learner.shadow.state_dict().items():
        assert (t.double() - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max().clamp_min(1), name
    assert not torch.equal(run.learner.shadow.head.fc.weight, run.learner.model.head.fc.weight)


def test_learning_rate() -> None:
    s = settings(
        {"data": "x", "batch": 512, "lr_base": 0.1, "epochs": 10, "warmup": 2.0, "cooldown": 3, "lr_min": 1e-3}
    )
    rates = [s.rate(step, 5) for step in range(13 * 5)]
    assert rates[:2] == pytest.approx([0.02, 0.04])
    assert max(rates) == rates[10] == pytest.approx(0.2)
    assert rates[10 + 20] == pytest.approx((0.2 + 1e-3) / 2)
    assert all(a > b for a, b in itertools.pairwise(rates[10:50]))
    assert rates[50:] == [1e-3] * 15


def test_recipes() -> None:
    paper = settings({"data": "x"})
    assert (paper.model, paper.epochs, paper.cooldown, paper.batch) == ("s", 120, 10, 1024)
    assert (paper.momentum, paper.weight_decay, paper.label_smoothing, paper.ema) == (0.9, 1e-4, 0.1, 0.9999)
    assert (paper.randaugment, paper.erase, paper.crop_scale, paper.lr_min) == (9, 0.2, 0.08, 1e-5)
    large = settings({"data": "x", "model": "xl"})
    assert (large.dropout, large.erase) == (0.1, 0.4)
    assert settings({"data": "digits"}).recipe == "cifar"
    assert settings({"data": "digits"}).network(10).in_chans == 1
    assert settings({"data": "x", "recipe": "cifar"}).model == "cifar"
    for recipe in RECIPES:
        settings({"data": "x", "recipe": recipe}).network(10)


def test_yaml_and_flags_are_equals(tmp_path: Path, data: Path) -> None:
    """Each field from a file, each as a flag; what is written is read back."""
    other = {"int": 3, "float": 0.25, "bool": True}
    values = {name: other.get(str(f.type), f.default) for name, f in FIELDS.items()}
    values |= {"size": 24, "batch": 6, "data": str(data), "init": "", "tensorboard": False, "warmup": 0.5}
    path = tmp_path / "a.yaml"
    path.write_text(
        "".join(f"{name}: {str(v).lower() if isinstance(v, bool) else repr(v)}\n" for name, v in values.items())
    )
    assert read_yaml(path) == values
    chosen = Settings(**values)
    path.write_text(written(chosen))
    assert Settings(**read_yaml(path)) == chosen
    path.write_text("epochs: 2  # few\nlr_base: 1e-3\nout: 'an äöü folder'\n")
    assert read_yaml(path) == {"epochs": 2, "lr_base": 1e-3, "out": "an äöü folder"}
    help_text = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    assert all(f"--{name.replace('_', '-')}" in help_text for name in FIELDS if name != "data")


def test_a_lower_rate_after_divergence(data: Path, tmp_path: Path) -> None:
    chosen = tiny(data, tmp_path / "out", lr_base=1e9, warmup=0.0, momentum=0.0, weight_decay=0.0, epochs=20)
    with pytest.raises(Stopped, match=r"(the loss is (nan|inf)|a weight is not finite) in epoch \d+.*--lr-base"):
        trained(chosen)
    if (tmp_path / "out" / "last.safetensors").exists():
        assert all(
            t.isfinite().all() for t in load_checkpoint(tmp_path / "out" / "last.safetensors").state_dict().values()
        )


def test_the_last_good_checkpoint_is_named(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss becomes NaN in the second epoch."""
    step = Learner.step

    def spoiled(learner: Learner, batches, done: int, rate: float):
        return step(learner, batches, done, rate) * (float("nan") if done == 4 else 1)

    monkeypatch.setattr(Learner, "step", spoiled)
    chosen = tiny(data, tmp_path / "out")
    with pytest.raises(
        Stopped, match=r"the loss is nan in epoch 2, before step 5: stopped; the last good checkpoint is .*last"
    ):
        trained(chosen)
    point = state.read(tmp_path / "out", "last")
    assert point is not None
    assert point.progress["step"] == 3
    monkeypatch.setattr(Learner, "step", step)
    trained(chosen, resume=True)
    trained(tiny(data, tmp_path / "whole"))
    assert left(tmp_path / "out") == left(tmp_path / "whole")


def test_autocast_trains(data: Path, tmp_path: Path) -> None:
    _, quiet = trained(tiny(data, tmp_path, amp=True, epochs=1))
    assert np.isfinite(quiet.rows[0]["loss"])
