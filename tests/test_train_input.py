"""`parnet train` with bad pictures, settings, folders and files: one clear message each, and nothing is lost."""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_train import ONE, Quiet, data, draw, left, tiny, trained  # noqa: F401
from typer.testing import CliRunner

from parnet_kernels import load_checkpoint
from parnet_kernels.app.cli import app
from parnet_kernels.archive import CheckpointError
from parnet_kernels.train import augmentation, state
from parnet_kernels.train.loop import Run, Stopped
from parnet_kernels.train.settings import read_yaml, settings
from parnet_kernels.train.sources import pictures

YAML = {
    "epoch: 3": "line 1: no setting 'epoch'; did you mean 'epochs'?",
    "batch: 8\n\nepochs: ten\n": "line 3: `epochs` must be an integer, got 'ten'",
    "batch: 8\nepochs: 0\n": "line 2: `epochs` must be ≥ 1 and ≤ 1e+09, got 0",
    "lr_base: .nan\n": "line 1: `lr_base` must be a number, got '.nan'",
    "lr_base: nan\n": "line 1: `lr_base` must be a number, got nan",
    "ema: 1.5": "line 1: `ema` must be in [0, 1), got 1.5",
    "sync_bn: maybe": "line 1: `sync_bn` must be true or false, got 'maybe'",
    "model: xxl": "line 1: `model` must be one of s, m, l, xl, cifar, got 'xxl'",
    "batch: 8\nbatch: 9": "line 2: 'batch' stands twice",
    "batch: [8]": "line 1: `batch` must be an integer",
    "batch: 8\n  epochs: 3": "line 2: not YAML: mapping values are not allowed here",
    "- batch": "line 1: expected lines such as `epochs: 30`",
    "just text": "line 1: expected lines such as `epochs: 30`",
    "!!python/object/apply:os.system ['true']": "line 1: expected lines such as `epochs: 30`",
    "qqqqq: 1": "line 1: no setting 'qqqqq' among data, recipe",
    "? [a]\n: 1": "line 1: no setting",
}


@pytest.mark.parametrize("text", YAML, ids=[repr(text) for text in YAML])
def test_yaml(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run\.yaml") as caught:
        read_yaml(path)
    assert YAML[text] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"epochs: \xff")
    with pytest.raises(ValueError, match="must be UTF-8 text"):
        read_yaml(tmp_path / "a.yaml")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a file"):
        read_yaml(tmp_path / "pipe")
    (tmp_path / "a.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "a.yaml") == {}


def parnet(*words: str) -> tuple[int, str]:
    """(exit status, all that is printed) of `parnet train`, as a user sees it."""
    result = CliRunner().invoke(app, ["train", *words])
    told = (
        result.output if result.exception is None or isinstance(result.exception, SystemExit) else str(result.exception)
    )
    assert isinstance(result.exception, SystemExit | ValueError | OSError | None), repr(result.exception)
    return result.exit_code, " ".join(told.replace("│", " ").split())


def test_command_line(data: Path, tmp_path: Path) -> None:  # noqa: F811
    for words, message in {
        (): "name the pictures: DATA, or `data` in the YAML file",
        ("/nowhere",): "no folder or file /nowhere",
        (str(data), "--epochs", "0"): "`epochs` must be ≥ 1 and ≤ 1e+09, got 0",
        (str(data), "--epochs", "ten"): "integer",
        (str(data), "--recipe", "mine"): "`recipe` must be one of imagenet, cifar, got 'mine'",
        (str(data), "--config", "/nowhere.yaml"): "/nowhere.yaml",
        (str(data), "--device", "cuda"): "`device` is cuda, and PyTorch finds none",
        (str(data), "--recipe", "cifar", "--warmup", "99"): "`warmup` must be ≤ `epochs`, 30, got 99",
        (str(data), "--recipe", "cifar", "--width", "1", "--streams", "2", "--batch", "8"): "",
        (str(data), "--init", str(data), "--batch", "8"): "no checkpoint file",
    }.items():
        if message and not ("cuda" in words and torch.cuda.is_available()):
            status, output = parnet(*words, "--out", str(tmp_path / "out"))
            assert status, words
            assert message in output, output


def spoiled(tmp_path: Path) -> Path:
    """Pictures of which some are damaged, in every way."""
    root = draw(tmp_path / "d")
    (root / "train" / "class 0" / "1.png").write_bytes(b"")
    (root / "train" / "class 1" / "2.png").write_bytes(b"not a picture")
    whole = (root / "train" / "class 2" / "3.png").read_bytes()
    (root / "train" / "class 2" / "3.png").write_bytes(whole[: len(whole) // 2])
    frames = [Image.fromarray(np.full((12, 12), v, np.uint8)) for v in (0, 128, 255)]
    frames[0].save(root / "train" / "class 0" / "2.gif", save_all=True, append_images=frames[1:])
    os.mkfifo(root / "train" / "class 0" / "pipe.png")  # opening it would wait for ever
    (root / "val" / "class 0" / "0.png").write_bytes(whole[:40])
    (root / "train" / "class 0" / "notes.txt").write_text("no picture")
    (root / "train" / "class 0" / ".hidden.png").write_bytes(b"")
    return root


def test_damaged_pictures(tmp_path: Path) -> None:
    """Each costs itself, and is named once; the run is the same for every number of workers."""
    root = spoiled(tmp_path)
    run, quiet = trained(tiny(root, tmp_path / "out", epochs=2))
    assert len(run.data.train) == 29
    for message in (
        "train/class 0/1.png is empty",
        "cannot read the picture train/class 1/2.png",
        "cannot read the picture train/class 2/3.png",
        "train/class 0/2.gif: it is animated, or of several pages, 3 in all: the first is taken",
        "pipe.png is not a file",
        "left out of validation: cannot read the picture val/class 0/0.png",
    ):
        assert sum(message in said for said in quiet.said) == 1, (message, quiet.said)
    assert quiet.rows[-1]["top5"] == 1  # of 8 pictures
    trained(tiny(root, tmp_path / "workers", epochs=2, workers=2))
    assert left(tmp_path / "workers") == left(tmp_path / "out")


def test_nothing_but_damaged_pictures(tmp_path: Path) -> None:
    root = draw(tmp_path / "d", train=20)
    for path in root.glob("train/class 0/*"):
        path.write_bytes(b"x")
    with pytest.raises(
        OSError, match="16 pictures in a row cannot be read, the last: cannot read the picture train/class 0"
    ):
        trained(tiny(root, tmp_path / "out"))


def test_forms_of_data_sets(tmp_path: Path) -> None:
    def said(root: Path, *arguments: object) -> str:
        with pytest.raises((ValueError, OSError)) as caught:
            pictures(str(root), 0.1, 0, 0)
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in said(tmp_path / "empty")
    root = draw(tmp_path / "d")
    assert "is in no class: expected train/<class>/<file>" in said(with_file(root, "train/a.png"))
    root = draw(tmp_path / "e")
    assert "class 'other' is in the validation part only" in said(with_file(root, "val/other/a.png"))
    root = draw(tmp_path / "f", classes=1)
    assert "training needs at least 2 classes, found ['class 0']" in said(root)
    root = draw(tmp_path / "g")
    shutil.rmtree(root / "val" / "class 1")
    assert pictures(str(root), 0.1, 0, 0).warnings == ["1 of 3 classes have no pictures for validation: 'class 1'"]
    root = draw(tmp_path / "h", train=1)
    assert pictures(str(root), 0.1, 0, 0).warnings == ["3 of 3 classes have one training picture, such as 'class 0'"]
    root = draw(tmp_path / "k")
    (root / "train" / "empty").mkdir()
    assert "class 'empty' holds no pictures" in said(root)
    shutil.move(root, tmp_path / "around" / "k")
    assert "class 'empty' holds no pictures" in said(tmp_path / "around")
    assert "class 'empty' holds no pictures" in said(tmp_path / "around" / "k" / "train")
    root = draw(tmp_path / "i")
    shutil.move(root / "train", root / "test")
    assert "there is a folder 'val', but none of training: 'train'" in said(root)
    root = draw(tmp_path / "j")
    shutil.copytree(root / "train", root / "unlabelled")
    (root / "train" / "class 1" / "loop").symlink_to(root / "train")
    os.makedirs(os.fsencode(root) + b"/train/caf\xe9")
    shutil.copy(root / "val" / "class 0" / "0.png", os.fsencode(root) + b"/train/caf\xe9/\xff.png")
    found = pictures(str(root), 0.1, 0, 0)
    assert found.warnings[0] == "not used, beside 'train' and 'val': 'unlabelled'"
    assert (len(found.train), found.class_names[0]) == (28, "caf\udce9")
    assert found.reader.read(found.train[0].name)
    assert len(found.fingerprint()) == 32
    os.mkfifo(tmp_path / "pipe")
    assert "must be a folder, a zip or a tar file" in said(tmp_path / "pipe")
    (tmp_path / "text.zip").write_text("no archive")
    assert "cannot read" in said(tmp_path / "text.zip")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as t:
        t.add(root, "d")
    assert "it is compressed, so that pictures in it cannot be found; decompress it" in said(tmp_path / "a.tar.gz")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.write(root / "val" / "class 0" / "0.png", "../../a/b.png")
    assert "a.zip holds no pictures" in said(tmp_path / "a.zip")  # none above the root


def with_file(root: Path, name: str) -> Path:
    path = root / name
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    return root


def test_cut_off_archives(data: Path, tmp_path: Path) -> None:  # noqa: F811
    with tarfile.open(tmp_path / "a.tar", "w") as t:
        t.add(data, "d")
    whole = (tmp_path / "a.tar").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        for path in data.rglob("*.png"):
            z.write(path, path.relative_to(data))
    found = pictures(str(tmp_path / "a.tar"), 0.1, 0, 0)
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="cut off"):
        [found.reader.read(sample.name) for sample in found.train]
    (tmp_path / "a.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"a\.zip"):
        pictures(str(tmp_path / "a.zip"), 0.1, 0, 0)


def test_batches_that_do_not_fit(data: Path, tmp_path: Path) -> None:  # noqa: F811
    for more, message in {
        ("batch", 28): "`batch` must be ≤ the training pictures, 27, got 28",
        ("accumulate", 3): "`batch` must be a multiple of processes × accumulate, 3, got 8",
        ("accumulate", 8): "",  # maps of several pixels: a batch of one is enough
    }.items():
        chosen = tiny(data, tmp_path / "out", **dict([more]))
        if not message:
            Run(chosen, ONE, Quiet())
            continue
        with pytest.raises(ValueError, match=message):
            Run(chosen, ONE, Quiet())
    with pytest.raises(
        ValueError, match=r"`batch` 8 gives each BatchNorm 1 picture at a time, whose map at .* is one pixel"
    ):
        Run(tiny(data, tmp_path / "b", accumulate=8, size=4), ONE, Quiet())
    with pytest.raises(ValueError, match="`batch` 1 gives each BatchNorm 1 picture at a time, whose map at combine"):
        Run(settings({"data": str(data), "batch": 1, "size": 32, "out": str(tmp_path / "c")}), ONE, Quiet())


def test_resume_is_of_the_same_run(data: Path, tmp_path: Path) -> None:  # noqa: F811
    chosen = tiny(data, tmp_path / "out", epochs=1)
    trained(chosen)
    before = left(tmp_path / "out")
    with pytest.raises(ValueError, match=r"out holds a run: --resume goes on with it; or name another folder"):
        trained(chosen)
    with pytest.raises(ValueError, match=r"has other settings: batch is 4, was 8; seed is 1, was 0"):
        trained(tiny(data, tmp_path / "out", epochs=1, batch=4, seed=1), resume=True)
    other = shutil.copytree(data, tmp_path / "other")
    trained(tiny(data, tmp_path / "out", epochs=1, workers=1, log_every=7), resume=True)  # how it runs may differ
    (data / "train" / "class 0" / "new.png").write_bytes((data / "train" / "class 0" / "1.png").read_bytes())
    try:
        with pytest.raises(ValueError, match=r"the pictures in .* are not those of the run"):
            trained(chosen, resume=True)
    finally:
        (data / "train" / "class 0" / "new.png").unlink()
    assert left(tmp_path / "out")["last.safetensors"] == before["last.safetensors"]
    assert other.exists()


def test_damaged_checkpoints(data: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out"
    trained(tiny(data, out, epochs=1))
    chosen = tiny(data, out, epochs=1)
    (part,) = out.glob("last.state-*.safetensors")
    whole = part.read_bytes()
    part.write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match="truncated, or not a state of training"):
        trained(chosen, resume=True)
    part.unlink()
    with pytest.raises(CheckpointError, match=r"has no state to go on from .*--init starts from its weights"):
        trained(chosen, resume=True)
    part.write_bytes(whole)
    trained(chosen, resume=True)


def test_folders_that_cannot_be_written(data: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing")):
        with pytest.raises(ValueError, match=f"cannot write to the folder {out}"):
            trained(tiny(data, out))


def test_a_full_disk(data: Path, tmp_path: Path) -> None:  # noqa: F811
    """The system takes no more bytes for a file from the second checkpoint on: the first stays whole."""
    out = tmp_path / "out"
    chosen = tiny(data, out)
    run = Run(chosen, ONE, Quiet())
    save, limits = run._save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(names: list[str], epoch: int) -> None:
        if epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            save(names, epoch)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    run._save = full  # type: ignore[method-assign]
    with pytest.raises(
        Stopped, match=r"cannot write .*File too large.*the last good checkpoint is .*last\.safetensors"
    ):
        run()
    assert load_checkpoint(out / "last.safetensors").class_names
    assert not list(out.glob(".*"))
    trained(chosen, resume=True)
    trained(tiny(data, tmp_path / "whole"))
    assert left(out) == left(tmp_path / "whole")


def test_a_killed_reader(data: Path, tmp_path: Path) -> None:  # noqa: F811
    """One of the processes that read pictures is killed, as the system does when memory is short."""
    run = Run(tiny(data, tmp_path / "out", workers=1), ONE, quiet := Quiet())
    step = run.learner.step

    def killed(batches, done: int, rate: float):
        if done == 4:
            for reader in run._training._loader._iterator._workers:  # type: ignore[union-attr]
                reader.kill()
                reader.join()
        return step(batches, done, rate)

    run.learner.step = killed  # type: ignore[method-assign]
    with pytest.raises(OSError, match="a process that reads pictures was killed"):
        run()  # after the batches that were read before
    assert quiet.rows
    trained(tiny(data, tmp_path / "out"), resume=True)
    trained(tiny(data, tmp_path / "whole"))
    assert left(tmp_path / "out") == left(tmp_path / "whole")


def test_no_room_for_logs(data: Path, tmp_path: Path) -> None:  # noqa: F811
    out, chosen = tmp_path / "out", tiny(data, tmp_path / "out")
    run, limits = Run(chosen, ONE, Quiet()), resource.getrlimit(resource.RLIMIT_FSIZE)
    step = run.learner.step

    def full(batches, done: int, rate: float):
        if done == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, ((out / "steps.csv").stat().st_size + 20, limits[1]))
        return step(batches, done, rate)

    run.learner.step = full  # type: ignore[method-assign]
    try:
        with pytest.raises(
            Stopped, match=r"cannot write .*steps\.csv.*the last good checkpoint is .*last\.safetensors"
        ):
            run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    trained(chosen, resume=True)
    trained(tiny(data, tmp_path / "whole"))
    assert left(out) == left(tmp_path / "whole")


def test_two_runs_in_one_folder(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(state.Owned, "WAIT", 0.3)
    run = Run(tiny(data, tmp_path, epochs=1, workers=1), ONE, Quiet())  # its worker stays alive, as long as `run` does
    with pytest.raises(ValueError, match=r"cannot write to the folder .*: another process trains there"):
        Run(tiny(data, tmp_path, epochs=1), ONE, Quiet())
    run()
    assert trained(tiny(data, tmp_path, epochs=1), resume=True)[0].done == 3


@given(
    st.text("ab:-[]{}#&*!|>'\"%@`,? \n\t0.ñ\0", max_size=30)
    | st.sampled_from(["epochs: 9" + "9" * n for n in (20, 400, 5000)])
)
@hypothesis.settings(max_examples=150, deadline=None)
def test_any_yaml(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text)
    with contextlib.suppress(ValueError):
        read_yaml(path)


def test_missing_packages(data: Path, tmp_path: Path) -> None:  # noqa: F811
    """Each is named by the command that brings it; TensorBoard's and matplotlib's are not needed."""
    program = (
        "import sys\n"
        "for name in sys.argv.pop(1).split(','): sys.modules[name] = None\n"
        "from parnet_kernels.app.cli import main\n"
        "main()"
    )

    def run(missing: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-c",
            program,
            missing,
            "train",
            *words,
            "--out",
            str(tmp_path / missing),
            "--threads",
            "1",
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=200)

    small = ["--recipe", "cifar", "--width", "4", "--size", "12", "--batch", "8", "--epochs", "1"]
    done = run("kornia,torchvision", str(data), *small)
    assert done.returncode == 2
    assert "pip install parnet-kernels[train]" in done.stderr
    assert "Traceback" not in done.stderr
    done = run("tensorboardX,matplotlib,yaml,sklearn", str(data), *small)
    assert done.returncode == 0, done.stderr


def test_a_torchvision_of_another_torch_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name.startswith("torchvision"):
                raise RuntimeError("operator torchvision::nms does not exist")

    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    assert augmentation.library() == "kornia"
