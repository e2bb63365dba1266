"""An independent ParNet in training form, composed of stock modules as the paper and PARNET.md describe it.

Shares no code with the package, only the names of the published state dict. Odd sizes: the pooling branch sees the map
padded with zeros at the right and bottom, as the folded network does.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


def activation_module(name: str) -> nn.Module:
    return nn.SiLU() if name == "silu" else nn.ReLU()


class ConvNorm(nn.Module):
    def __init__(self, c: int, k: int, kernel: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, k, kernel, stride, padding=(kernel - 1) // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(k)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class PadAndPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        bottom, right = x.shape[2] % 2, x.shape[3] % 2
        return nn.AvgPool2d(2, 2)(nn.ZeroPad2d((0, right, 0, bottom))(x))


class Squeeze(nn.Module):
    def __init__(self, c: int, k: int, groups: int) -> None:
        super().__init__()
        self.cvsig = nn.ModuleDict({"conv": nn.Conv2d(c, k, 1, groups=groups, bias=False)})
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.sigmoid(self.cvsig["conv"](self.pool(x)))


class OracleBlock(nn.Module):
    def __init__(self, c: int, k: int, stride: int = 1, groups: int = 1, activation: str = "silu") -> None:
        super().__init__()
        self.groups = groups
        self.rbr_dense = ConvNorm(c, k, 3, stride, groups)
        point = ConvNorm(c, k, 1, 1, groups)
        self.rbr_1x1 = point if stride == 1 else nn.Sequential(PadAndPool(), point)
        self.rbr_identity = nn.BatchNorm2d(c) if (c, stride) == (k, 1) else None
        self.se = Squeeze(c, k, groups)
        self.act = activation_module(activation)

    def forward(self, x: Tensor) -> Tensor:
        convolved = self.rbr_dense(x) + self.rbr_1x1(x)
        if self.rbr_identity is not None:
            skip = self.rbr_identity(x)
            y = self.act(convolved + skip * self.se(skip))
        else:
            y = self.act(convolved * self.se(x) * 2)
        if self.groups == 1:
            return y
        n, k, h, w = y.shape
        return y.reshape(n, self.groups, k // self.groups, h, w).transpose(1, 2).reshape(n, k, h, w)


class Wrapped(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class TwoNorms(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.b1, self.b2 = nn.BatchNorm2d(c), nn.BatchNorm2d(c)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.b1(pair[0]), self.b2(pair[1])


class Interleaved(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat([t[:, i : i + 1] for i in range(pair[0].shape[1]) for t in pair], 1)


class OracleParNet(nn.Module):
    """Stride-2 stem, downsampling block last: the published ImageNet form with any widths and depths."""

    def __init__(
        self,
        planes: tuple[int, ...],
        num_blocks: tuple[int, ...],
        num_classes: int,
        in_chans: int = 3,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        *p, last = planes
        c0 = min(64, p[0])

        def block(c: int, k: int, stride: int, groups: int = 1) -> Wrapped:
            return Wrapped(OracleBlock(c, k, stride, groups, activation))

        def fusion(c: int, k: int, stride: int) -> nn.Sequential:
            return nn.Sequential(TwoNorms(c), Interleaved(), block(2 * c, k, stride, 2))

        self.inits = nn.ModuleList([nn.Sequential(block(in_chans, c0, 2), block(c0, p[0], 2))])
        self.inits.extend(block(a, b, 2) for a, b in pairwise(p))
        self.streams = nn.ModuleList(
            nn.Sequential(*(block(c, c, 1) for _ in range(n - 1))) for c, n in zip(p, num_blocks, strict=True)
        )
        if len(p) == 1:  # nothing to fuse
            self.combine = nn.Sequential(*[nn.Identity()] * 3, block(p[0], last, 2))
            self.head = nn.ModuleDict({"fc": nn.Linear(last, num_classes)})
            return
        self.downsamples_2 = nn.ModuleList([block(p[0], p[1], 2)])
        self.downsamples_2.extend(fusion(p[s], p[s + 1], 2) for s in range(1, len(p) - 1))
        self.combine = nn.Sequential(*fusion(p[-1], p[-1], 1), block(p[-1], last, 2))
        self.head = nn.ModuleDict({"fc": nn.Linear(last, num_classes)})

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for init, stream in zip(self.inits, self.streams, strict=True):
            x = init(x)
            outputs.append(stream(x))
        if len(outputs) == 1:
            y = self.combine(outputs[0])
        else:
            y = self.downsamples_2[0](outputs[0])
            for stage, output in zip(self.downsamples_2[1:], outputs[1:], strict=False):
                y = stage((output, y))
            y = self.combine((outputs[-1], y))
        return self.head["fc"](y.mean((2, 3)))


def randomize(model: nn.Module, seed: int = 0, hard: bool = False) -> nn.Module:
    """Random BatchNorms, as far from the identity as trained ones; `hard`: some γ zero and negative too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                if hard:
                    module.weight.mul_(torch.randint(-1, 2, module.weight.shape, generator=generator))
                module.bias.uniform_(-0.5, 0.5, generator=generator)
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return model


def error(found: Tensor, expected: Tensor) -> float:
    """Norm-wise relative error, in float64."""
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
