"""A tiny network in both forms, training and deployed, and images."""

import copy

import torch
from oracle import randomize

from parnet_kernels import DeployedParNet, ParNet, ParNetConfig
from parnet_kernels.config import cifar_config

TINY = {
    "3 streams": ParNetConfig((5, 7, 6, 9), (2, 3, 2), num_classes=4),
    "2 streams": ParNetConfig((3, 4, 5), (2, 2), num_classes=4),
    "1 stream": ParNetConfig((7, 9), (3,), num_classes=4),
    "1 empty stream": ParNetConfig((7, 9), (1,), num_classes=4),
    "4 streams, relu": ParNetConfig((4, 5, 6, 8, 7), (2, 2, 3, 2), num_classes=4, activation="relu"),
    "empty streams": ParNetConfig((5, 7, 6, 9), (1, 1, 1), num_classes=4),
    "empty middle stream": ParNetConfig((4, 6, 4, 5), (2, 1, 2), num_classes=4),
    "no classifier": ParNetConfig((5, 7, 6, 9), (2, 2, 2), num_classes=0),
    "five channels in": ParNetConfig((5, 7, 6, 9), (2, 2, 2), num_classes=4, in_chans=5),
    "cifar": cifar_config(6).replace(num_classes=4),
    "cifar, other stem": cifar_config(6).replace(num_classes=4, stem_width=5),
}


def pair(config: ParNetConfig | str, hard: bool = False) -> tuple[ParNet, DeployedParNet]:
    """(training form in float64, deployed form in float32), BatchNorms as far from the identity as trained ones."""
    torch.manual_seed(0)
    model = randomize(ParNet(config), hard=hard).eval()
    return copy.deepcopy(model).double(), model.deploy()


def image(size: tuple[int, int], n: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(1))
