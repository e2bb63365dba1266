"""Several launches in a row on the same buffers."""

from __future__ import annotations

from typing import Any

from .errors import PtxSanitizerError
from .memory import DeviceMemory
from .module import PtxModule
from .native import core
from .report import Result


class Session:
    """Keeps device memory (and a modelled L2 cache of `l2_bytes`) across launches, as a stream would run them.

    A buffer keeps its address, and bytes that one launch wrote count as initialised in the next. Launches are ordered,
    so races are looked for inside each of them. `results` has one entry a launch.
    """

    def __init__(self, l2_bytes: int | None = None, **defaults: Any):
        self.memory = DeviceMemory()
        self.l2 = core().L2Model(l2_bytes) if l2_bytes else None
        self.defaults = defaults
        self.results: list[Result] = []

    def register(self, array: Any) -> int:
        """As PtxModule.register, for all launches of the session."""
        return self.memory.register(array)

    def launch(self, module: PtxModule, kernel: str, *args: Any, **options: Any) -> Result:
        """PtxModule.launch on the session's memory."""
        try:
            result = module.launch(kernel, *args, **{**self.defaults, **options}, memory=self.memory, l2=self.l2)
        except PtxSanitizerError as error:
            self.results.append(error.result)
            raise
        self.results.append(result)
        return result

    def summary(self) -> str:
        """A line a launch, and the sums."""
        lines = []
        for i, r in enumerate(self.results):
            requested = r.global_load["bytes"] + r.global_store["bytes"]
            cache = f", L2 fetches {r.l2['fetched_bytes']} B" if r.l2 else ""
            lines.append(
                f"{i}: {r.kernel} grid={r.grid} {r.warp_instructions} warp instructions, {requested} B requested, "
                f"{r.unique_read} + {r.unique_written} B compulsory{cache}, {len(r.reports)} reports"
            )
        total = sum(r.warp_instructions for r in self.results)
        return "\n".join([*lines, f"{len(self.results)} launches, {total} warp instructions"])
