"""A PTX simulator: runs compiled GPU kernels on the CPU, checks their memory accesses and counts what they do.

README.md says how to use it, how to read a report, and what it cannot see.
"""

from .errors import PtxError, PtxFault, PtxSanitizerError, Unavailable
from .memory import Uninit
from .module import PtxModule
from .report import Report, Result
from .session import Session
from .tensor_map import tensor_map
from .toolchain import compile_cuda, compile_triton, ptxas_info

__all__ = [
    "PtxError",
    "PtxFault",
    "PtxModule",
    "PtxSanitizerError",
    "Report",
    "Result",
    "Session",
    "Unavailable",
    "Uninit",
    "compile_cuda",
    "compile_triton",
    "ptxas_info",
    "tensor_map",
]
