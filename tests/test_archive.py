"""Files of torch.save: what training scripts put beside the weights, and files that declare more than they hold."""

from __future__ import annotations

import argparse
import enum
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from parnet_kernels import CheckpointError, ParNet, ParNetConfig, load_checkpoint, load_model, save
from parnet_kernels.app.cli import app

CONFIG = ParNetConfig((4, 6, 8, 8), (2, 2, 2), num_classes=3)


def model() -> ParNet:
    torch.manual_seed(0)
    return ParNet(CONFIG).eval()


class Mode(enum.Enum):
    best = "best"


class ByName:
    """As an enum of Python 3.11.2 is pickled: by `builtins.getattr`, which protocol 2 calls `__builtin__.getattr`."""

    def __reduce__(self) -> tuple:
        return getattr, (Mode, "best")


class Settings:
    def __init__(self) -> None:
        self.path = Path("x")
        self.other = {"mode": Mode.best, "by name": ByName()}


class Harmful:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("harm-was-done",)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_numpy_values_beside_the_weights(tmp_path: Path, legacy: bool) -> None:
    network = model()
    content = {
        "best": np.float64(76.5),
        "values": [np.float32(1), np.int64(2), np.bool_(True), np.complex64(1j), np.str_("a")],
        "history": np.arange(6.0).reshape(2, 3),
        "objects": np.array([{}, None], dtype=object),
        "args": argparse.Namespace(lr=np.float64(0.1), additional_branches=[["swish"]]),
        "state_dict": network.state_dict(),
    }
    torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=not legacy)
    found = load_checkpoint(tmp_path / "model.pth")
    assert found.config == CONFIG.replace(activation="relu")  # from `args`
    assert all(
        torch.equal(a, b) for a, b in zip(found.state_dict().values(), network.state_dict().values(), strict=True)
    )


def test_objects_of_other_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network, x = model(), torch.randn(1, 3, 32, 32)
    torch.save({"settings": Settings(), "state_dict": network.state_dict()}, "model.pth")
    with pytest.raises(CheckpointError, match=r"needs GLOBAL [\w.]+, which may not .*True \(--ignore-classes\)"):
        load_checkpoint("model.pth")
    assert torch.equal(load_checkpoint("model.pth", ignore_classes=True)(x), network(x))
    assert torch.allclose(load_model("model.pth", ignore_classes=True)(x), network(x), rtol=1e-4, atol=1e-5)
    for arguments in (["convert", "model.pth", "net.safetensors"],):
        assert CliRunner().invoke(app, arguments).exit_code == 1
        assert CliRunner().invoke(app, [*arguments, "--ignore-classes"]).exit_code == 0
    torch.save({"settings": Settings(), "state_dict": network.state_dict(), "harm": Harmful()}, "harmful.pth")
    with pytest.raises(CheckpointError, match=r"needs GLOBAL posix\.mkdir, which may not be loaded$"):
        load_checkpoint("harmful.pth", ignore_classes=True)
    assert not Path("harm-was-done").exists()
    torch.save({"state_dict": {"conv.weight": Settings()}}, "other.pth")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        load_checkpoint("other.pth", ignore_classes=True)


def test_another_number_of_classes(tmp_path: Path) -> None:
    network = model()
    network.class_names = ("a", "b", "c")
    save(network, tmp_path / "net.safetensors")
    for source in (network.state_dict(), tmp_path / "net.safetensors"):
        for n in (3, 5, 0):
            found = load_checkpoint(source, num_classes=n)
            assert (found.num_classes, found(torch.randn(2, 3, 32, 32)).shape[1]) == (n, n or 8)
            assert torch.equal(
                found.inits[0][0].block.se.cvsig.conv.weight, network.inits[0][0].block.se.cvsig.conv.weight
            )
    assert load_checkpoint(tmp_path / "net.safetensors", num_classes=3).class_names == ("a", "b", "c")
    assert load_checkpoint(tmp_path / "net.safetensors", num_classes=5).class_names is None
    for wrong in (-1, 2.0, True, "3"):
        with pytest.raises(ValueError, match="`num_classes` must be an integer ≥ 0 or None"):
            load_checkpoint(network.state_dict(), num_classes=wrong)


def rezipped(source: Path, target: Path, compression: int) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


def bytearray_of(n: int, module: bytes = b"builtins") -> bytes:
    return b"\x80\x02c" + module + b"\nbytearray\n\x8a\x05" + n.to_bytes(5, "little") + b"\x85R."


def test_bombs_are_refused_at_once(tmp_path: Path) -> None:
    """Within a second and a few MB each, in a process of its own whose memory is limited."""
    torch.save({"state_dict": model().state_dict(), "more": OrderedDict(x=torch.zeros(50 << 20))}, tmp_path / "big.pth")
    rezipped(tmp_path / "big.pth", tmp_path / "deflated.pth", zipfile.ZIP_DEFLATED)
    (tmp_path / "big.pth").unlink()
    for name, size in (("bytes.pth", 30_000_000_000), ("plain.pth", 30_000_000_000)):
        if name == "plain.pth":
            (tmp_path / name).write_bytes(bytearray_of(size))
            (tmp_path / "python2.pth").write_bytes(bytearray_of(size, b"__builtin__"))
            continue
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("archive/data.pkl", bytearray_of(size))
            archive.writestr("archive/version", "3\n")
    with zipfile.ZipFile(tmp_path / "twice.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("archive/data.pkl", bytearray_of(30_000_000_000))
    code = """
import resource, sys, time
from parnet_kernels import CheckpointError, load_checkpoint
for path in sys.argv[1:]:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        load_checkpoint(path)
    except CheckpointError as error:
        print(error)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert more < 20_000 and time.process_time() - start < 1, (path, more, time.process_time() - start)
"""
    paths = ["deflated.pth", "bytes.pth", "plain.pth", "python2.pth", "twice.pth"]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    messages = done.stdout.splitlines()
    assert [m.split(":")[0] for m in messages] == [f"cannot read {path}" for path in paths]
    for message, expected in zip(messages, ("declares", *["bytearray"] * 3, "one name"), strict=True):
        assert expected in message


def test_a_repacked_file_is_read(tmp_path: Path) -> None:
    network, x = model(), torch.randn(1, 3, 32, 32)
    torch.save(network.state_dict(), tmp_path / "model.pth")
    rezipped(tmp_path / "model.pth", tmp_path / "stored.pth", zipfile.ZIP_STORED)
    assert torch.equal(load_checkpoint(tmp_path / "stored.pth")(x), network(x))
