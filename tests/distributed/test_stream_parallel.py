"""StreamParallel on two and three gloo ranks: bits, errors, ranks that die."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks

pytestmark = pytest.mark.timeout(180)
Found = dict[int, dict[str, Any]]


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 3], ids="{} ranks".format)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank saw in each scenario; one start of the processes serves all."""
    with Ranks("together", request.param, tmp_path_factory.mktemp("ranks")) as ranks:
        return ranks.results()


@pytest.mark.parametrize("scenario", ["equal_bits", "other_ways"])
def test_bits_are_those_of_one_process(scenario: str, found: Found) -> None:
    for rank in found:
        assert found[rank][scenario] == []


BAD = {
    "none": "{last} has no images",
    "none on rank 0": "0 has no images",
    "another size": "{last} has another shape of the images than rank 0: [1, 3, 48, 32], not [1, 3, 32, 32]",
    "another batch on rank 0": "1 has another shape of the images than rank 0: [1, 3, 32, 32], not [2, 3, 32, 32]",
    "other pixels": "{last} has another content of the images (CRC-32)",
    "another layout": "{last} has another layout of the images",
    "another dtype": "{last} has wrong images: `x` is torch.float64",
    "not an image": "{last} has wrong images: `x` must be a dense tensor [N, 3, H, W], got [3, 32, 32]",
    "not a tensor": "{last} has wrong images: `x` must be a tensor [N, 3, H, W], got a builtins.list",
    "needs a gradient": "{last} has images that need a gradient",
    "autocast": "{last} has autocast on",
    "another result": "{last} has another kind of result",
    "hooks": "{last} has a network that cannot be cut into streams: layers.streams_0_0: has hooks",
    "gradients": "{last} has a network that cannot be cut into streams: weights need gradients",
    "other weights": "{last} has another weights (SHA-256) than rank 0",
}


def test_bad_input_is_an_error_on_every_rank(found: Found) -> None:
    for of_rank in found.values():
        seen = dict(of_rank["bad_input"])
        for trunk in ("recompute", "send"):
            for right in ("right", "right without gradients"):
                assert seen.pop(f"{right}, {trunk}")[0] == "no error"
            for name, text in BAD.items():
                error, seconds = seen.pop(f"{name}, {trunk}")
                expected = f"DistributedError: parnet_kernels: rank {text.format(last=len(found) - 1)}"
                assert error.startswith(expected), name
                assert seconds < 20
        assert not seen


NOT_MADE = {
    "a stream twice": "ValueError: parnet_kernels: `streams` must give each of {world} ranks at least one",
    "a rank without streams": "ValueError: parnet_kernels: `streams` must give each of {world} ranks at least one",
    "trunk": "ValueError: parnet_kernels: `trunk` must be one of",
    "result": "ValueError: parnet_kernels: `result` must be one of",
    "source": "ValueError: parnet_kernels: `source` must be None or 0, got 1",
    "timeout": "ValueError: parnet_kernels: `timeout` must be > 0 seconds, got 0",
    "not a network": "ValueError: parnet_kernels: `network` must be a DeployedParNet, got Linear",
    "other weights": "DistributedError: parnet_kernels: rank {last} has another weights (SHA-256) than rank 0: ",
    "another configuration": "DistributedError: parnet_kernels: rank {last} has another configuration than rank 0: ",
    "another dtype": "DistributedError: parnet_kernels: rank {last} has another dtype than rank 0: torch.bfloat16",
    "other options": "DistributedError: parnet_kernels: rank {last} has another trunk than rank 0: send, not auto",
    "another backend": "DistributedError: parnet_kernels: rank {last} has another backend than rank 0: reference",
    "hooks": "DistributedError: parnet_kernels: rank {last} has another network than rank 0: cannot be cut",
    "another version": "DistributedError: parnet_kernels: rank {last} has another version of parnet_kernels",
    "late": "DistributedError: parnet_kernels: rank {last} did not make its StreamParallel within 2 s",
    "too many ranks": "ValueError: parnet_kernels: `group` must have at most 2 ranks, one a stream, got 3 ranks",
}


def test_what_cannot_be_made_is_an_error_on_every_rank(found: Found) -> None:
    world = len(found)
    for rank in found:
        for name, (error, _) in found[rank]["not_made"].items():
            if name == "late" and rank == world - 1:
                continue  # it came, and found that the others had been there
            assert error.startswith(NOT_MADE[name].format(world=world, last=world - 1)), name
        assert len(found[rank]["not_made"]) == len(NOT_MADE) - (world == 2)


def test_an_error_while_computing_is_told_to_all(found: Found) -> None:
    for of_rank in found.values():
        for trunk in ("recompute", "send"):
            for who in found:
                error, _ = of_rank["failing"][f"rank {who}, {trunk}"]
                assert error == f"DistributedError: parnet_kernels: rank {who} failed: MemoryError: no memory left"
                assert of_rank["failing"][f"right after {who}, {trunk}"]


QUICK = ("killed-3-2-recompute", "stopped-3-0-send")
LOST = [
    pytest.param(how, world, victim, trunk, id=name, marks=() if name in QUICK else pytest.mark.slow)
    for how in ("killed", "stopped", "late")
    for world, victim in ((2, 0), (2, 1), (3, 0), (3, 1), (3, 2))
    for trunk in ("recompute", "send")
    for name in [f"{how}-{world}-{victim}-{trunk}"]
]


@pytest.mark.parametrize(("how", "world", "victim", "trunk"), LOST)
def test_a_lost_rank_is_an_error_in_time_on_all_others(
    how: str, world: int, victim: int, trunk: str, tmp_path: Path
) -> None:
    with Ranks("lost", world, tmp_path, f"{victim} {how} {trunk}") as ranks:
        ranks.reached(victim, "ready")
        if how != "late":
            ranks.processes[victim].send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        results = ranks.results(missing=() if how == "late" else (victim,))
    for rank, found in results.items():
        assert found["first"]
        assert found["after"]
        if rank == victim:
            continue
        error, seconds = found["lost"]
        reason = {
            "killed": "broke off (process",
            "stopped": "did not answer within 3 s",
            "late": "did not answer within 3 s",
        }
        assert error.startswith(f"Broken: parnet_kernels: rank {victim} {reason[how]}")
        assert {"killed": "has ended", "stopped": "is stopped", "late": "is running"}[how] in error
        assert seconds < 4
        assert found["again"][0].startswith("RuntimeError: parnet_kernels: StreamParallel needs `reconnect()`: rank")
        assert found["again"][1] < 0.5


@pytest.mark.slow
def test_ranks_in_network_namespaces_with_a_delay() -> None:
    """Compares bits as well, on rank 0."""
    command = [sys.executable, "-m", "bench.streams", "ranks", "--variant", "s", "--size", "64", "--rounds", "3"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, "--namespaces"], capture_output=True, text=True, timeout=170, cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("no network namespaces here"):
        pytest.skip(done.stdout.strip())
    latency = float(done.stdout.partition("link ")[2].split()[0])
    assert latency > 1000  # µs: the delay was there
