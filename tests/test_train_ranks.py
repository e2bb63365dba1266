"""`parnet train` in several processes, as torchrun starts them: the curve of one; what happens when one is killed."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from test_train import data, tiny, trained  # noqa: F401

from parnet_kernels.train.settings import Settings, written

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def torchrun(chosen: Settings, folder: Path, ranks: int, *more: str) -> subprocess.Popen[str]:
    (folder / "run.yaml").write_text(written(chosen))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *more]
    command += ["-m", "parnet_kernels.train", "--config", str(folder / "run.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def losses(out: Path, name: str = "steps") -> list[float]:
    path = out / f"{name}.csv"
    return [float(row["loss"]) for row in csv.DictReader(path.open())] if path.exists() else []


def child(parent: int, rank: int) -> int:
    """The process of `rank` under torchrun."""
    for name in Path(f"/proc/{parent}/task").glob("*/children"):
        for pid in map(int, name.read_text().split()):
            if f"\0LOCAL_RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
                return pid
    raise AssertionError(f"rank {rank} does not run")


@pytest.mark.parametrize(
    "killed", [pytest.param(0, marks=pytest.mark.slow, id="the first"), pytest.param(1, id="another")]
)
def test_two_processes_are_one_and_a_killed_one_ends_the_run(killed: int, data: Path, tmp_path: Path) -> None:  # noqa: F811
    """The curve of 2 ranks with SyncBatchNorm is that of one process until one is killed; one process goes on then."""
    more = {"sync_bn": True, "epochs": 7, "randaugment": 5, "accumulate": 2, "save_every": 2, "lr_base": 0.2}
    trained(tiny(data, tmp_path / "one", **more))
    expected = losses(tmp_path / "one")
    chosen = tiny(data, tmp_path / "two", **more)
    process = torchrun(chosen, tmp_path, 2)
    try:
        while len(losses(tmp_path / "two")) < 4:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        os.kill(child(process.pid, killed), signal.SIGKILL)
        start = time.monotonic()
        output = process.communicate(timeout=60)[0]
        assert time.monotonic() - start < 30
    finally:
        process.kill()
        process.wait()
    assert process.returncode != 0
    assert f"parnet: process {1 - killed}" in output, output
    assert "--resume goes on from the last checkpoint" in output
    done = losses(tmp_path / "two")
    assert 4 <= len(done) < len(expected)
    assert done == pytest.approx(expected[: len(done)], rel=1e-5)
    run, _ = trained(chosen, resume=True)
    assert run.done == run.total == len(expected)
    assert losses(tmp_path / "two") == pytest.approx(expected, rel=1e-3)
    for name in ("epochs", "steps"):
        assert len(losses(tmp_path / "two", name)) == len(losses(tmp_path / "one", name))


@pytest.mark.slow
def test_torchrun_starts_again(data: Path, tmp_path: Path) -> None:  # noqa: F811
    more = {"sync_bn": True, "epochs": 10, "save_every": 2}
    trained(tiny(data, tmp_path / "one", **more))
    expected = losses(tmp_path / "one")
    process = torchrun(tiny(data, tmp_path / "two", **more), tmp_path, 2, "--max-restarts", "1")
    try:
        while len(losses(tmp_path / "two")) < 4:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        os.kill(child(process.pid, 1), signal.SIGKILL)
        output = process.communicate(timeout=120)[0]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, output
    assert losses(tmp_path / "two") == pytest.approx(expected, rel=2e-2)


@pytest.mark.slow
def test_a_mistake_of_the_first_process_ends_all(data: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "last.safetensors").touch()
    process = torchrun(tiny(data, tmp_path / "out"), tmp_path, 2)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert output.count("out holds a run: --resume goes on with it") >= 1
