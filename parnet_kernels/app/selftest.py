"""The start-up self-test: every GPU kernel against the reference in float64, on the user's own GPU.

`parnet info --selftest` prints its rows. A failure of the CUDA kernels turns that backend off for the process; one of
those that use wgmma, which only Hopper has, leaves their work to the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from parnet_kernels import ops, reference, selection
from parnet_kernels.config import ParNetConfig
from parnet_kernels.cuda import backend as cuda
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
BACKENDS = ("cuda", "triton")
# Rows of kernels that only Hopper has, which others can take the place of; and of those whose blocks work in pairs.
WGMMA = "wgmma "
PAIRS = "wgmma in pairs "


class Row(NamedTuple):
    backend: str
    what: str
    error: float  # norm-wise, relative; infinite if the kernel raised
    allowed: float
    message: str  # of the exception, or empty

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def selftest(device: torch.device | str = "cuda") -> list[Row]:
    """One row a kernel; none without a GPU. Disables the CUDA backend, or its use of wgmma, if such a row failed."""
    if not torch.cuda.is_available():
        return []
    device = torch.device(device)
    before = cuda_plan.wgmma()
    try:
        cuda_plan.use_wgmma("never")
        rows = [row for backend in BACKENDS for row in _backend_rows(backend, device)]
        modes: tuple[tuple[cuda_plan.Wgmma, str], ...] = (("always", WGMMA), ("paired", PAIRS))
        for when, prefix in modes:
            cuda_plan.use_wgmma(when)
            if before != "never" and cuda_plan.Gpu.of(device).wgmma == when:
                rows += _backend_rows("cuda", device, prefix)
    finally:
        cuda_plan.use_wgmma(before)
    _disable_failed(rows)
    return rows


def _disable_failed(rows: list[Row]) -> None:
    failed = [row for row in rows if row.backend == "cuda" and not row.passed]
    if any(row.what.startswith(WGMMA) for row in failed):
        cuda_plan.use_wgmma("never")
    others = [row.what for row in failed if not row.what.startswith(WGMMA)]
    if others:
        cuda.disable(f"the self-test failed: {', '.join(others)}")


def _backend_rows(backend: str, device: torch.device, prefix: str = "") -> list[Row]:
    rows = []
    for name, dtype, precision, allowed in ARITHMETICS:
        x = torch.empty(1, 8, 4, 4, dtype=dtype, device=device)
        if selection.BACKENDS[backend].why_not("repvgg_sse", x) is not None or (prefix and dtype == torch.float32):
            continue
        with ops.use_backend(backend), float32_precision(precision), torch.no_grad():
            for op, strides in (("repvgg_sse", (1,)), ("downsample_se", (1, 2)), ("fusion_se", (1, 2))):
                for stride in strides:
                    call, exact = _layer(op, stride, dtype, device)
                    rows.append(_row(backend, f"{prefix}{op} {name} stride {stride}", call, exact, allowed))
            if backend == "cuda":
                for n in (1, 3):
                    call, exact = _network(n, dtype, device)
                    rows.append(
                        _row(backend, f"{prefix}network {name} batch {n}", call, exact, NETWORK_LAYERS * allowed)
                    )
    return rows


def _row(backend: str, what: str, call: Any, exact: Tensor, allowed: float) -> Row:
    try:
        found = call().double()
        error = ((found - exact).norm() / exact.norm()).item()
    except RuntimeError as failure:
        return Row(backend, what, float("inf"), allowed, str(failure).splitlines()[0])
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
