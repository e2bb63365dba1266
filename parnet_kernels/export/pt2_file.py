"""Networks as AOTInductor packages: programs that C++, or Python without this package's code, can run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parnet_kernels import _native
from parnet_kernels._version import __version__
from parnet_kernels.cpu.network import CpuNetwork
from parnet_kernels.cuda.plan import Gpu
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.export import pt2_cuda
from parnet_kernels.export.network import deployed_form, metadata
from parnet_kernels.files import check_target
from parnet_kernels.model import ParNet
from parnet_kernels.precision import current_precision
from parnet_kernels.quantized import QuantizedParNet
from parnet_kernels.whole import WholeNetwork

_WHAT = "export.package"
_LARGEST = 1 << 14  # pixels of a side, images of a batch: bounds that the compiler is told


def package(
    network: DeployedParNet | ParNet,
    path: str | Path,
    *,
    storage: str | None = None,
    size: tuple[int, int] | None = None,
    batch: int = 1,
) -> None:
    """Writes `network`, folded, as an AOTInductor package (.pt2): one call of the native CPU kernels, or, for a network
    on a CUDA device, of the CUDA kernels.

    Whoever runs it loads `parnet_kernels/_C.so`, for a GPU `_C_cuda.so` too, then the package: `torch.ops.load_library`
    and `torch._inductor.aoti_load_package` in Python, `dlopen` and `AOTIModelPackageLoader` in C++ (`examples/cpp`). It
    takes images [N, in_chans, H, W] of the network's dtype, contiguous, and gives logits, or channel means without a
    classifier.

    On the CPU N, H and W are any in 1…16384. Results are those of `network`, bit for bit. The last layer of the CIFAR
    form is made by the compiler: there they are the same up to rounding, and H and W must be 5 or more. The weights are
    packed for the instruction set of this process, which the package's metadata name as `parnet_isa`; processors whose
    vectors have another length refuse it: set PARNET_CPU_ISA (avx2) while exporting for them.

    On a GPU N, H and W are `batch` and `size`. The launches are planned for the GPU that the network is on, which
    `parnet_isa` names; where kernels for another architecture run, the call fails and says so.

    The metadata also hold `parnet_device`, `parnet_dtype` and what the network says of itself, as JSON.

    Args:
        network: of either form; a training form is folded with its running statistics.
        path: the file to write; must end in .pt2.
        storage: see `DeployedParNet.prepare`; None: as the network has it.
        size: (height, width), for a GPU.
        batch: number of images, for a GPU.

    Raises:
        RuntimeError: the native kernels cannot run this network: the reason is named.
        ValueError: an argument that does not fit, named; or a network to which something was done that the file would
            not hold: hooks, patched or added layers.
        TypeError: `network` is no ParNet, or an int8 network.
        OSError: the file cannot be written.
    """
    check_target(path, _WHAT)
    if Path(path).suffix != ".pt2":
        raise ValueError(f"{_WHAT}: `path` must end in .pt2, got {path}")
    if isinstance(network, QuantizedParNet):
        raise TypeError(f"{_WHAT}: a package holds no int8 network; export the float one, or this one as ONNX")
    network = deployed_form(network, _WHAT)
    module: nn.Module
    if network.head_weight.is_cuda:
        if size is None or not all(1 <= extent <= _LARGEST for extent in (*size, batch)):
            raise ValueError(
                f"{_WHAT}: for a GPU `size` must be (height, width) and `batch` a number of images, each in "
                f"1…{_LARGEST}, got {size} and {batch}"
            )
        module, example, made_for = _on_gpu(network, (batch, network.config.in_chans, *size))
        dynamic = None
    else:
        if size is not None or batch != 1:
            raise ValueError(f"{_WHAT}: `size` and `batch` are for a GPU: a package for the CPU takes any images")
        module, example = _whole_network(network, storage)
        dynamic, made_for = {"x": _sizes(module)}, _isa()
    said = {"parnet_isa": made_for, "parnet_device": example.device.type}
    said["parnet_dtype"] = str(example.dtype).removeprefix("torch.")
    write(module, example, dynamic, said | metadata(network), path)


def write(
    module: nn.Module, example: Tensor, dynamic: dict[str, Any] | None, about: dict[str, str], path: str | Path
) -> None:
    """Compiles `module` for images like `example`, but for the `dynamic` sizes, with `about` as metadata."""
    target = Path(path).absolute()
    part = target.with_name(f".{target.stem}.part.pt2")  # the compiler writes itself, and wants the ending
    info = {"parnet_kernels": __version__, **about}
    try:
        with torch.no_grad():
            program = torch.export.export(module, (example,), dynamic_shapes=dynamic)
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(part), inductor_configs={"aot_inductor.metadata": info}
            )
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _on_gpu(network: DeployedParNet, shape: tuple[int, ...]) -> tuple[nn.Module, Tensor, str]:
    """(the network as a module of one operator, images for it, what it is made for)."""
    with torch.no_grad():
        weight = network.head_weight
        example = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        found = network.whole()
        if isinstance(found, WholeNetwork):
            reason = network._cuda_network.why_not(found, example) or pt2_cuda.why_not(found)
            if reason is None:
                gpu = Gpu.of(weight.device)
                precision = "tf32" if current_precision() == "tf32" else "ieee"
                name = torch.cuda.get_device_name(weight.device)
                return pt2_cuda.CudaExported(found, shape, precision, gpu), example, f"{name}, sm_{gpu.image}"
            found = reason
    raise RuntimeError(f"{_WHAT}: the CUDA kernels cannot run this network: {found}")


def _whole_network(network: DeployedParNet, storage: str | None) -> tuple[_Exported, Tensor]:
    """(the network as a module of one operator, an image for it)."""
    with torch.no_grad():
        found = network.whole()
        weight = network.head_weight
        example = torch.zeros(2, network.config.in_chans, 64, 64, dtype=weight.dtype, device=weight.device)
        runner = CpuNetwork(network._native.storage)
        runner.use(storage)
        reason = found if isinstance(found, str) else runner.why_not(found, example)
        packed = None
        if reason is None and isinstance(found, WholeNetwork):
            packed = runner.prepare(found)
            reason = "a weight is not finite"
        if packed is None or not isinstance(found, WholeNetwork):
            raise RuntimeError(f"{_WHAT}: the native CPU kernels cannot run this network: {reason}")
    return _Exported(found, packed), example


class _Exported(nn.Module):
    """A whole network as one operator, and what follows it in the CIFAR form."""

    packed: Tensor
    steps: Tensor
    classifier: Tensor | None

    def __init__(self, network: WholeNetwork, packed: Any) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("packed", packed.weights)
        self.register_buffer("steps", packed.steps)
        self.register_buffer("classifier", packed.classifier)
        operators = network.operators()
        reduced = {"image": 1}
        for layer, _ in operators:
            reduced[layer.name] = reduced[layer.inputs[0]] * layer.stride
        last = operators[-1][0]
        self.pooled = not network.config.pointwise_head
        self.outputs = last.out_channels if packed.classifier is None else network.config.num_classes
        self.reduction = reduced[last.name]
        self.hash = _hash([t for t in (packed.weights, packed.classifier) if t is not None])
        if not self.pooled:
            for name, t in {
                **network.arguments[-1],
                "head_weight": network.head[0],
                "head_bias": network.head[1],
            }.items():
                self.register_buffer(f"end_{name}", t)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.parnet._cpu_exported(
            x, self.packed, self.steps, self.classifier, self.pooled, self.outputs, self.reduction, self.hash
        )
        return y if self.pooled else self.network.end(y, "logits" if self.network.config.num_classes else "pooled")


def _sizes(module: _Exported) -> dict[int, Any]:
    """Which sizes the package takes. The compiler sees the last map of the CIFAR form, which must have 2 × 2 pixels."""
    dim, least = torch.export.Dim, 1 if module.pooled else module.reduction + 1
    return {0: dim("n", min=1, max=_LARGEST), **{i: dim(f"size{i}", min=least, max=_LARGEST) for i in (2, 3)}}


def _hash(tensors: list[Tensor]) -> int:
    """64 bits of a digest of their bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for t in tensors:
        digest.update(t.numpy().data)
    return int.from_bytes(digest.digest(), "little", signed=True)


def _isa() -> str:
    return _native.cpu_info()["isa"]


@torch.library.register_fake("parnet::_cpu_exported")
def _shape(x: Tensor, packed: Any, steps: Any, classifier: Any, pooled: bool, k: int, stride: int, key: int) -> Tensor:
    n, _, h, w = x.shape
    return x.new_empty(n, k) if pooled else x.new_empty(n, k, (h - 1) // stride + 1, (w - 1) // stride + 1)
