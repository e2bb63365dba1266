"""`parnet train --resume`: to the bit, whenever and however the run was stopped."""

import csv
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from test_train import data, left, tiny, trained  # noqa: F401
from typer.testing import CliRunner

from parnet_kernels.app.cli import app
from parnet_kernels.app.train import _Screen
from parnet_kernels.train import state
from parnet_kernels.train.logs import Logs
from parnet_kernels.train.settings import written

pytest.importorskip("kornia")
pytest.importorskip("yaml")

HARD = {"randaugment": 9, "erase": 0.5, "dropout": 0.2, "accumulate": 2, "save_every": 1, "ema": 0.9}


@pytest.mark.parametrize(
    "more",
    [pytest.param({}, marks=pytest.mark.slow), {"ema": 0.0}, HARD],
    ids=["ema", "no ema", "everything random, parts"],
)
def test_a_resumed_run_is_the_same_to_the_bit(more: dict, data: Path, tmp_path: Path) -> None:  # noqa: F811
    """Cut after a step within an epoch; the checkpoint before it is of an epoch, or of a step."""
    whole = tiny(data, tmp_path / "whole", **more)
    trained(whole)
    cut = tiny(data, tmp_path / "cut", **more)
    with pytest.raises(KeyboardInterrupt):
        trained(cut, stop_at=5)
    assert len(list(csv.DictReader((tmp_path / "cut" / "steps.csv").open()))) == 5
    run, _ = trained(cut, resume=True)
    assert run.done == run.total == 9
    assert left(tmp_path / "cut") == left(tmp_path / "whole")
    assert trained(cut, resume=True)[1].rows == []  # complete: nothing happens
    assert left(tmp_path / "cut") == left(tmp_path / "whole")


@pytest.mark.parametrize(
    "n", [pytest.param(1, marks=pytest.mark.slow), 2, 3, pytest.param(4, marks=pytest.mark.slow), 6]
)
def test_cut_at_any_file(
    n: int,
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The n-th file of the checkpoints is half written, and nothing after it runs."""
    expected = tmp_path / "whole"
    trained(tiny(data, expected, epochs=2))
    count = 0

    def cut(path: Path, content: bytes) -> None:
        nonlocal count
        count += 1
        if count == n:
            path.with_name(f".{path.name}.1.part").write_bytes(content[: len(content) // 2])
            raise KeyboardInterrupt
        path.write_bytes(content)

    chosen = tiny(data, tmp_path / "cut", epochs=2)
    with monkeypatch.context() as patch:
        patch.setattr(state, "write_whole", cut)
        with pytest.raises(KeyboardInterrupt):
            trained(chosen)
    trained(chosen, resume=True)
    assert left(tmp_path / "cut") == left(expected)
    assert not list((tmp_path / "cut").glob(".*"))


@pytest.mark.parametrize("written_first", [False, True])
def test_cut_beside_the_log(
    written_first: bool,
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before or after the row of the second epoch is in the table: it is there once in the end."""
    trained(tiny(data, tmp_path / "whole"))
    epoch = Logs.epoch

    def cut(logs: Logs, **row: float) -> None:
        if written_first or row["epoch"] != 2:
            epoch(logs, **row)
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    chosen = tiny(data, tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(Logs, "epoch", cut)
        with pytest.raises(KeyboardInterrupt):
            trained(chosen)
    trained(chosen, resume=True)
    assert left(tmp_path / "cut") == left(tmp_path / "whole")


def test_killed_in_the_middle_of_writing(data: Path, tmp_path: Path) -> None:  # noqa: F811
    """kill -9 while bytes of the second checkpoint are on their way into the file."""
    trained(tiny(data, tmp_path / "whole"))
    cut = tmp_path / "cut"
    arguments = ["train", str(data), "--config", str(tmp_path / "run.yaml")]
    (tmp_path / "run.yaml").write_text(written(tiny(data, cut)))
    program = (
        "import os, pathlib, signal, sys\n"
        "from parnet_kernels.app.cli import main\n"
        "real, writes = pathlib.Path.write_bytes, []\n"
        "def write(path, content):\n"
        "    writes.append(path)\n"
        "    if len([p for p in writes if 'last.s' in p.name]) == 4:\n"
        "        real(path, content[:1000])\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(path, content)\n"
        "pathlib.Path.write_bytes = write\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert list(cut.glob(".*.part"))
    result = CliRunner().invoke(app, [*arguments, "--resume"])
    assert result.exit_code == 0, result.output
    assert "goes on from step 3" in result.output
    assert left(cut) == left(tmp_path / "whole")


def test_interrupted_by_hand(data: Path, tmp_path: Path) -> None:  # noqa: F811
    """Ctrl-C: says how to go on."""
    (tmp_path / "run.yaml").write_text(written(tiny(data, tmp_path / "out", epochs=200)))
    command = [sys.executable, "-m", "parnet_kernels.train", "--config", str(tmp_path / "run.yaml")]
    # Shells start background jobs, perhaps this very run, with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    signal.signal(signal.SIGINT, before)
    try:
        while not (tmp_path / "out" / "last.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
        process.wait()
    assert process.returncode not in (0, -signal.SIGINT)
    assert re.search(r"stopped after step \d+ of 600; --resume goes on from the last checkpoint", output), output
    assert "Traceback" not in output


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupt_inside_a_finaliser_is_not_lost() -> None:
    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    before, steps = signal.signal(signal.SIGINT, signal.default_int_handler), []

    def run() -> None:
        screen = _Screen(Console(), False)
        with screen.watching():
            for step in range(3):
                screen.step(step, 3, 0, 1.0, 1.0)
                steps.append(step)
                Finalised()

    try:
        with pytest.raises(KeyboardInterrupt):
            run()
        assert steps == [0]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
