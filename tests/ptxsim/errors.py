"""What the simulator raises."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import Report, Result


class PtxError(Exception):
    """Bad input: PTX that cannot be read or executed, or a launch that does not fit it. Nothing has run."""


class PtxFault(PtxError):
    """The kernel was stopped: out of bounds, misaligned, deadlock, trap, too many instructions.

    `line` is the PTX line (0 if there is none), `reports` what had been reported until then.
    """

    def __init__(self, message: str, line: int, reports: list[Report]):
        super().__init__(message)
        self.line = line
        self.reports = reports


class PtxSanitizerError(PtxError):
    """The kernel ran to its end and was reported on; `result` holds the counters and the reports."""

    def __init__(self, message: str, result: Result):
        super().__init__(message)
        self.result = result


class Unavailable(Exception):
    """Something the simulator needs is not on this machine; the text says what and is fit for a skip."""
