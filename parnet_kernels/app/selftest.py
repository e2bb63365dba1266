"""The start-up self-test: every GPU kernel against the reference in float64, on the user's own GPU.

`parnet info --selftest` prints its rows. What fails is turned off, now and in later processes (`verdict.py`): a
backend, or, of kernels that only Hopper has, their use. Kernels run in processes of their own, a group in each, so that
one that hangs or ends its process spoils nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parnet_kernels import _native, ops, reference, selection, verdict
from parnet_kernels.config import ParNetConfig
from parnet_kernels.cuda import plan as cuda_plan
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.precision import float32_precision

#: (name, dtype, precision of float32, norm-wise error allowed of one layer)
ARITHMETICS = [
    ("float16", torch.float16, "ieee", 1e-3),
    ("bfloat16", torch.bfloat16, "ieee", 8e-3),
    ("tf32", torch.float32, "tf32", 1e-3),
    ("float32", torch.float32, "ieee", 2e-6),
]
NETWORK_LAYERS = 5  # a network may be off by so many layers' errors
# Rows of kernels that only Hopper has, which others can take the place of; and of those whose blocks work in pairs.
WGMMA = "wgmma "
PAIRS = "wgmma in pairs "
#: Of each group: the part that a failure turns off, how plans use warpgroup tiles, and seconds until it counts as hung
#: (Triton compiles first).
GROUPS: dict[str, tuple[str, cuda_plan.Wgmma, float]] = {
    "cuda": ("cuda", "never", 120),
    "wgmma": ("wgmma", "always", 120),
    "pairs": ("wgmma", "paired", 120),
    "triton": ("triton", "never", 600),
}


class Row(NamedTuple):
    backend: str
    what: str
    error: float  # norm-wise, relative; infinite if the kernel raised
    allowed: float
    message: str  # of the exception, or empty

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def selftest(device: torch.device | str = "cuda", seconds: float | None = None) -> list[Row]:
    """One row a kernel; none without a GPU. What failed is off from now on.

    Args:
        seconds: after which a group of kernels counts as hung; default: GROUPS.
    """
    if not torch.cuda.is_available():
        return []
    device = torch.device(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    rows: list[Row] = []
    failed: verdict.Verdict = {}
    for group, (part, _, most) in GROUPS.items():
        command = [sys.executable, "-m", "parnet_kernels.app.selftest", group, str(index)]
        found = run_group(group, command, most if seconds is None else seconds)
        rows += found
        names = [row.what + (f" ({row.message})" if row.message else "") for row in found if not row.passed]
        if names:
            others = f" and {len(names) - 3} others" if len(names) > 3 else ""
            failed.setdefault(part, f"the self-test failed on this GPU: {', '.join(names[:3])}{others}")
    verdict.remember(index, failed)
    return rows


def run_group(group: str, command: Sequence[str], seconds: float) -> list[Row]:
    """The rows that the command prints; if it ends badly or not in time, a row more that says so."""
    backend = "triton" if group == "triton" else "cuda"
    package = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))}
    environment.pop("PARNET_BACKEND", None)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            printed, told = process.communicate(timeout=seconds)
            failure = ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with compilers that it has started
            printed, told = process.communicate()
            failure = f"no end within {seconds:g} s"
    if not failure and process.returncode:
        said = (told.strip().splitlines() or ["nothing on standard error"])[-1]
        code = process.returncode
        failure = f"the process ended with {signal.Signals(-code).name if code < 0 else f'status {code}'}: {said}"
    rows = [Row(*json.loads(line)) for line in printed.splitlines() if line.startswith('["') and line.endswith("]")]
    if failure:
        last = rows[-1].what if rows else "none"
        rows.append(Row(backend, f"{group} kernels after {last}", float("inf"), 0, failure))
    return rows


def group_rows(group: str, device: torch.device) -> Iterator[Row]:
    """In the process of a group; it may also be the name of a backend."""
    part, wgmma, _ = GROUPS.get(group, (group, "never", 0.0))
    prefix = {"wgmma": WGMMA, "pairs": PAIRS}.get(group, "")
    before = cuda_plan.wgmma()
    cuda_plan.use_wgmma(wgmma)
    try:
        if prefix and (before == "never" or _native.cuda_error or cuda_plan.Gpu.of(device).wgmma != wgmma):
            return
        yield from _backend_rows("cuda" if prefix else part, device, prefix)
    finally:
        cuda_plan.use_wgmma(before)


def _backend_rows(backend: str, device: torch.device, prefix: str = "") -> Iterator[Row]:
    for name, dtype, precision, allowed in ARITHMETICS:
        x = torch.empty(1, 8, 4, 4, dtype=dtype, device=device)
        if selection.BACKENDS[backend].why_not("repvgg_sse", x) is not None or (prefix and dtype == torch.float32):
            continue
        with ops.use_backend(backend), float32_precision(precision), torch.no_grad():
            for op, strides in (("repvgg_sse", (1,)), ("downsample_se", (1, 2)), ("fusion_se", (1, 2))):
                for stride in strides:
                    call, exact = _layer(op, stride, dtype, device)
                    yield _row(backend, f"{prefix}{op} {name} stride {stride}", call, exact, allowed)
            if backend == "cuda":
                for n in (1, 3):
                    call, exact = _network(n, dtype, device)
                    yield _row(backend, f"{prefix}network {name} batch {n}", call, exact, NETWORK_LAYERS * allowed)


def _row(backend: str, what: str, call: Any, exact: Tensor, allowed: float) -> Row:
    try:
        found = call().double()
        error = ((found - exact).norm() / exact.norm()).item()
    except Exception as failure:  # of a compiler, a driver, a missing package: whatever it is, the kernel did not run
        text = str(failure).strip() or type(failure).__name__
        return Row(backend, what, float("inf"), allowed, text.splitlines()[0])
    return Row(backend, what, error if error == error else float("inf"), allowed, "")


def _layer(op: str, stride: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, Tensor]:
    """A call of an operator, and its result in float64. Sizes that fill no tile, channels that fill no chunk."""
    generator = torch.Generator().manual_seed(0)
    n, c, k, h, w = 2, 72, 72 if op == "repvgg_sse" else 90, 17, 19

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (mean + scale * torch.randn(shape, generator=generator)).to(device, dtype)

    maps = [normal(n, c, h, w) for _ in range(2 if op == "fusion_se" else 1)]
    tensors = [*maps, normal(k, c, 3, 3, scale=(9 * c) ** -0.5), normal(k, scale=0.3)]
    if op == "repvgg_sse":
        tensors += [normal(c, scale=0.3, mean=1.0), normal(c, scale=0.3)]
    tensors += [normal(k, c, scale=c**-0.5), normal(k, scale=0.3)]
    options: dict[str, Any] = {"out_scale": normal(k, scale=0.3, mean=1.0), "out_shift": normal(k, scale=0.3)}
    wide = {name: t.double() for name, t in options.items()}
    if op != "repvgg_sse":
        options["stride"] = wide["stride"] = stride
    exact = getattr(reference, op)(*(t.double() for t in tensors), **wide)
    return lambda: getattr(ops, op)(*tensors, **options), exact


def _network(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, Tensor]:
    """A small deployed network with well-scaled random weights, and its logits in float64."""
    generator = torch.Generator().manual_seed(0)
    network = DeployedParNet(ParNetConfig((24, 48, 96, 160), (4, 4, 4), num_classes=20))
    for name, weight in network.named_parameters():
        fan = weight[0].numel() if weight.dim() > 1 else 0
        value = torch.randn(weight.shape, generator=generator) * (fan**-0.5 if fan else 0.2)
        weight.copy_(value + 1 if name.endswith("scale") else value)
    network = network.to(device, dtype)
    x = torch.randn(n, 3, 96, 80, generator=generator).to(device, dtype)
    with ops.use_backend("reference"):
        exact = DeployedParNet.forward(_copy_in_double(network), x.double())
    return lambda: network(x), exact


def _copy_in_double(network: DeployedParNet) -> DeployedParNet:
    copy = DeployedParNet(network.config).to(network.head_weight.device, torch.float64)
    copy.load_state_dict({name: t.double() for name, t in network.state_dict().items()})
    return copy


if __name__ == "__main__":
    verdict.ignore()
    where = sys.argv[2]
    for found in group_rows(sys.argv[1], torch.device("cuda", int(where)) if where.isdigit() else torch.device(where)):
        print(json.dumps(found), flush=True)
