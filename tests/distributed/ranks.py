"""Runs a function of `scenarios.py` on several ranks, each a process; none outlives the test.

    python ranks.py SCENARIO RANK WORLD FOLDER [ARGUMENT]

The ranks meet in a FileStore under FOLDER; what a scenario returns is pickled there.
"""

from __future__ import annotations

import datetime
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIMIT = 90  # seconds of a test's processes


class Ranks:
    """Processes of one scenario. Context manager: kills what is left at its end."""

    def __init__(
        self,
        scenario: str,
        world: int,
        folder: Path,
        argument: str = "",
        prefix: dict[int, list[str]] | None = None,
        environment: dict[int, dict[str, str]] | None = None,
    ) -> None:
        self.folder, self.world = folder, world
        self.processes = []
        for rank in range(world):
            command = [*(prefix or {}).get(rank, []), sys.executable, str(HERE / "ranks.py")]
            variables = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}).get(rank, {})
            with (folder / f"log{rank}").open("w") as log:
                self.processes.append(
                    subprocess.Popen(
                        [*command, scenario, str(rank), str(world), str(folder), argument],
                        stdout=log,
                        stderr=log,
                        env=variables,
                    )
                )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def results(self, missing: tuple[int, ...] = ()) -> dict[int, Any]:
        """What each rank returned, but for those that are killed. Fails with the log of one that failed."""
        deadline = time.monotonic() + LIMIT
        found = {}
        for rank, process in enumerate(self.processes):
            if rank in missing:
                continue
            try:
                code = process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                code = None
            log = (self.folder / f"log{rank}").read_text()
            assert code == 0, f"rank {rank} ended with {code}:\n{log}"
            found[rank] = pickle.loads((self.folder / f"result{rank}").read_bytes())
        return found

    def reached(self, rank: int, mark: str) -> None:
        """Waits until a rank has made its mark."""
        deadline = time.monotonic() + LIMIT
        while not (self.folder / f"{mark}{rank}").exists():
            running = time.monotonic() < deadline and self.processes[rank].poll() is None
            assert running, (self.folder / f"log{rank}").read_text()
            time.sleep(0.02)


def _main(scenario: str, rank: int, world: int, folder: Path, argument: str) -> None:
    import scenarios
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=os.environ.get("RANKS_MEET_AT", f"file://{folder}/store"),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    result = getattr(scenarios, scenario)(rank, world, folder, argument)
    (folder / f"unfinished.{rank}").write_bytes(pickle.dumps(result))
    (folder / f"unfinished.{rank}").rename(folder / f"result{rank}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
