"""The layers of an int8 or bfloat16 network as one call of the native CPU kernels that convolve directly
(csrc/cpu/direct): packing, choice of kernels, workspaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from parnet_kernels import _native
from parnet_kernels.locks import Lock

#: The kernels by number, in the order of csrc/cpu/direct/dispatch.cpp.
KERNELS = ("portable", "tiles", "bf16_tiles", "avx2", "avx_vnni", "avx512_vnni", "amx", "bf16_amx")
#: What the kernels multiply: the dtypes of `DirectLayer.weight`.
DTYPES = (torch.int8, torch.bfloat16)
PANEL = 32  # output channels that one call multiplies
KINDS = ("repvgg_sse", "downsample_se", "fusion_se")
ACTIVATIONS = ("silu", "relu")
#: More input channels than this, and sums of products could leave 32 bits.
MAX_CHANNELS = 3600
#: More pixels of a map than this, and sums of its bytes could.
MAX_PIXELS = 1 << 23
_SPARE_WORKSPACES = 4  # of finished calls, kept for the next ones


@dataclass(frozen=True, eq=False)
class DirectLayer:
    """One layer as the kernels see it. q: values of an activation in memory, bytes or bfloat16, that stand for
    scale · (q − zero); in bfloat16 all scales are 1 and zeros 0.

    With P = Σ weight · (q − zero_in), in integers of bytes, and γ = σ(gate_weight·mean(x)·gate_scale + gate_bias):
    v = φ(weight_scale·scale_in·P + bias + γ·(skip_scale·x + skip_shift)) with a skip, else
    v = φ(2γ·(weight_scale·scale_in·P + bias)); the result is out_scale·v + out_shift, as values of scale_out, zero_out
    or, of the last layer, as floats.
    """

    kind: str
    stride: int
    weight: Tensor  # int8 or bfloat16 [K, C, 3, 3]
    weight_scale: Tensor  # [K]
    bias: Tensor  # [K]
    gate_weight: Tensor  # [K, C], of the same dtype
    gate_scale: Tensor  # [K]
    gate_bias: Tensor  # [K]
    skip_scale: Tensor | None  # [K]
    skip_shift: Tensor | None
    out_scale: Tensor  # [K], in the order of the result's channels
    out_shift: Tensor
    scale_in: float
    zero_in: int
    scale_out: float
    zero_out: int
    last: bool

    def why_not(self) -> str | None:
        """Why the kernels cannot take these values, or None."""
        k, c = self.weight.shape[0], self.weight.shape[1]
        for name in ("weight", "gate_weight"):
            dtype = torch.int8 if self.weight.dtype not in DTYPES else self.weight.dtype
            if (t := getattr(self, name)).dtype != dtype or t.device.type != "cpu":
                return f"{name} is {t.dtype} on {t.device}, not {str(dtype).removeprefix('torch.')} on the CPU"
        if self.weight.shape != (k, c, 3, 3) or self.gate_weight.shape != (k, c):
            return f"weight and gate_weight have shapes {list(self.weight.shape)} and {list(self.gate_weight.shape)}"
        for name, t in vars(self).items():
            if not isinstance(t, Tensor) or name in ("weight", "gate_weight"):
                continue
            if t.dtype != torch.float32 or t.device.type != "cpu" or t.shape != (k,):
                return f"{name} is {t.dtype} {list(t.shape)} on {t.device}, not float32 [{k}] on the CPU"
            if not bool(t.isfinite().all()):
                return f"{name} holds NaN or infinity"
        scales = (self.scale_in, self.scale_out)
        return None if all(0 < s < float("inf") for s in scales) else f"scales must be positive, got {scales}"


@dataclass(eq=False)
class Packed:
    """Layers for one kind of kernels, and workspaces that calls have left."""

    kernels: int
    weights: Tensor
    program: Tensor
    spare: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def take(self, x: Tensor) -> tuple[tuple[int, ...], Tensor]:
        """A workspace for maps like x, and what to give it back under."""
        key = (*x.shape, torch.get_num_threads())
        with self.lock:
            if self.spare.get(key):
                return key, self.spare[key].pop()
        size = torch.ops.parnet._cpu_direct_workspace.default(*x.shape, self.weights, self.program, self.kernels)
        return key, torch.empty(size, dtype=torch.uint8, device="cpu")

    def give_back(self, key: tuple[int, ...], workspace: Tensor) -> None:
        with self.lock:
            if sum(map(len, self.spare.values())) >= _SPARE_WORKSPACES:
                self.spare.clear()
            self.spare.setdefault(key, []).append(workspace)


def info() -> tuple[dict[torch.dtype, int], list[tuple[bool, int]]]:
    """The number of the best kernels for each dtype, or −1; of all: whether this processor can run them, and their quad
    multiple.
    """
    found = torch.ops.parnet._cpu_direct_info.default()
    best, rest = found[: len(DTYPES)], found[len(DTYPES) :]
    able = [(bool(able), multiple) for able, multiple in zip(rest[::2], rest[1::2], strict=True)]
    return dict(zip(DTYPES, best, strict=True)), able


def supported(dtype: torch.dtype = torch.int8) -> list[str]:
    """The names of the kernels for `dtype` that this processor can run."""
    if _native.cpu_error:
        return []
    named = zip(KERNELS, info()[1], strict=True)
    return [name for name, (able, _) in named if able and name.startswith("bf16_") == (dtype == torch.bfloat16)]


def why_not(dtype: torch.dtype = torch.int8) -> str | None:
    """Why products in `dtype` are not faster than float32 on this processor, or None."""
    if _native.cpu_error:
        return _native.cpu_error
    if info()[0][dtype] >= 0:
        return None
    if dtype == torch.int8:
        return "this processor has no instructions for sums of 8-bit products (AVX-VNNI, AVX-512 VNNI or AMX)"
    return "this processor has no instructions that multiply bfloat16 faster than Winograd's algorithm float32 (AMX)"


def choose(name: str | None, dtype: torch.dtype = torch.int8) -> int:
    """The number of the kernels `name`; None: of the best ones for `dtype`, or where float32 is faster the least slow.

    Raises:
        ValueError: this processor cannot run them.
    """
    names = supported(dtype)
    if name is None:
        best = info()[0][dtype]
        slow = "bf16_tiles" if dtype == torch.bfloat16 else "avx2" if "avx2" in names else "portable"
        return best if best >= 0 else KERNELS.index(slow)
    if name not in names:
        raise ValueError(f"parnet_kernels: `kernels` must be one of {names} on this processor, got {name!r}")
    return KERNELS.index(name)


def pack(layers: Sequence[tuple[DirectLayer, tuple[int, int, int]]], activation: str, kernels: int) -> Packed:
    """Layers with their values (input, second input or −1, output), for the kernels of this number."""
    multiple = info()[1][kernels][1]
    blob: list[Tensor] = []
    end = 0

    def put(t: Tensor | None) -> int:
        nonlocal end
        if t is None:
            return 0
        data = t.contiguous().view(-1).view(torch.uint8)
        start, end = end, end + -(-data.numel() // 64) * 64
        blob.append(F.pad(data, (0, end - start - data.numel())))
        return start

    program = []
    for layer, values in layers:
        (k, c), groups = layer.weight.shape[:2], 2 if layer.kind == "fusion_se" else 1

        def vector(t: Tensor | None, groups: int = groups, in_result: bool = False) -> Tensor | None:
            """[K] → [panel · 32]; the panels of two groups alternate."""
            if t is None:
                return None
            if in_result and groups == 2:  # channel 2i + g of the result is the i-th of group g
                t = torch.cat([t[0::2], t[1::2]])
            by_group = t.view(groups, -1)
            padded = F.pad(by_group, (0, -by_group.shape[1] % PANEL))
            return padded.view(groups, -1, PANEL).transpose(0, 1).contiguous()

        weight = _quads(layer.weight, groups, multiple)
        start = torch.zeros(k, dtype=torch.int64, device="cpu")  # the bits of zeros, integers or floats
        if layer.zero_in:
            start = -layer.zero_in * layer.weight.flatten(1).sum(1, dtype=torch.int64)
        gate = torch.stack([torch.nn.functional.pad(g, (0, 0, 0, -g.shape[0] % PANEL)) for g in _groups(layer, groups)])
        gate = gate.unflatten(1, (-1, PANEL)).permute(1, 0, 3, 2)  # [panel of a group][group][channel][lane]
        skip_scale = skip_shift = None
        if layer.skip_scale is not None and layer.skip_shift is not None:
            skip_scale = layer.skip_scale * layer.scale_in
            skip_shift = layer.skip_shift - layer.skip_scale * (layer.scale_in * layer.zero_in)
        out_scale, out_shift = layer.out_scale, layer.out_shift
        if not layer.last:
            out_scale, out_shift = out_scale / layer.scale_out, out_shift / layer.scale_out + layer.zero_out
        scale = torch.tensor([layer.scale_in], dtype=torch.float32, device="cpu")
        row = [KINDS.index(layer.kind), ACTIVATIONS.index(activation), layer.stride, *values, c, k]
        row += [int(layer.last), layer.zero_in, layer.zero_out]
        vectors = [vector(start.to(torch.int32)), vector(layer.weight_scale * layer.scale_in), vector(layer.bias)]
        vectors += [vector(skip_scale), vector(skip_shift), vector(out_scale, in_result=True)]
        vectors += [vector(out_shift, in_result=True), gate, vector(layer.gate_scale), vector(layer.gate_bias)]
        program.append([*row, *map(put, [scale, weight, *vectors])])
    packed = torch.ops.parnet._cpu_bytes(end)
    torch.cat(blob, out=packed)
    return Packed(kernels, packed, torch.tensor(program, dtype=torch.int64, device="cpu"))


def _groups(layer: DirectLayer, groups: int) -> tuple[Tensor, ...]:
    return layer.gate_weight.chunk(groups)


def _quads(weight: Tensor, groups: int, multiple: int) -> Tensor:
    """[K, C, 3, 3] → [panel][input][tap][quad][32][values of a quad], as csrc/cpu/direct/layer.h says."""
    in_quad = 4 // weight.element_size()
    c = weight.shape[1]
    inputs = groups
    # Of each group and input: the first channel, and the positions of its weights among the group's channels.
    segments = []
    for g in range(groups):
        for j in range(inputs):
            t = torch.arange(g * c, (g + 1) * c, device="cpu")
            own = t[t % inputs == j]
            segments.append((int(own[0]) // inputs // in_quad * in_quad if len(own) else 0, own // inputs, own - g * c))
    quads = [
        max(-(-(int(ch[-1]) + 1 - first) // in_quad) if len(ch) else 0 for first, ch, _ in segments[j::inputs])
        for j in range(inputs)
    ]
    quads = [-(-q // multiple) * multiple for q in quads]
    by_group = []
    for g in range(groups):
        w = weight.chunk(groups)[g].flatten(2)  # [K / groups, C, 9]
        w = F.pad(w, (0, 0, 0, 0, 0, -w.shape[0] % PANEL))
        parts = []
        for j in range(inputs):
            first, channels, positions = segments[g * inputs + j]
            wide = torch.zeros(w.shape[0], in_quad * quads[j], 9, dtype=weight.dtype, device="cpu")
            wide[:, channels - first] = w[:, positions]
            # [panel, 32, quad, value, tap] → [panel, tap, quad, 32, value]
            parts.append(wide.view(-1, PANEL, quads[j], in_quad, 9).permute(0, 4, 2, 1, 3).flatten(1))
        by_group.append(torch.cat(parts, 1))
    return torch.stack(by_group, 1)


def run(packed: Packed, x: Tensor) -> Tensor:
    """x: what the first layer reads, [N, C, H, W] in float32 for int8 layers, in bfloat16 for those → the last layer's
    map, float32, channels_last. An image with NaN or infinity in x, or in bfloat16 in any map but the last, gives NaN.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    key, workspace = packed.take(x)
    result: Tensor = torch.ops.parnet._cpu_direct_network.default(
        x, packed.weights, packed.program, packed.kernels, workspace
    )
    packed.give_back(key, workspace)
    return result
