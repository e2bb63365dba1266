"""sm_90 as a parameter of tests whose products Triton compiles to wgmma."""

import pytest
import triton
from ptxsim import PtxSanitizerError
from torch.torch_version import TorchVersion

WGMMA = pytest.param(
    90,
    marks=pytest.mark.xfail(
        TorchVersion(triton.__version__) < "3.7.1",
        reason="before 3.7.1 Triton sets no fence.proxy.async between cp.async and wgmma, as the PTX ISA requires",
        raises=PtxSanitizerError,
        strict=True,
    ),
)
