"""Whole networks as programs, for the tests of levels and networks."""

from __future__ import annotations

import functools
from typing import Any

import torch
from oracle import randomize
from player import play, workspace
from ptxsim.device import Device
from single import MATHS
from torch import Tensor

from parnet_kernels.config import VARIANTS, ParNetConfig
from parnet_kernels.cuda import network as cuda_network
from parnet_kernels.cuda.plan import A100, Gpu
from parnet_kernels.cuda.record import COUNTER_BYTES
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.model import ParNet

TINY = ParNetConfig((12, 22, 34, 50), (3, 3, 3), num_classes=10)


def tiny(config: ParNetConfig = TINY, seed: int = 0) -> DeployedParNet:
    """Folded in float64 from random BatchNorms as far from the identity as trained ones."""
    torch.manual_seed(seed)
    return randomize(ParNet(config), seed).eval().double().deploy()


def run(
    device: Device,
    network: DeployedParNet,
    x: Tensor,
    math: str,
    result: str = "logits",
    gpu: Gpu = A100,
    **simulator: Any,
) -> tuple[Tensor, list[Any], cuda_network.Lowered]:
    """The result for x, counters of the launches, and the program. Casts `network` to the arithmetic's type."""
    dtype, precision, _ = MATHS[math]
    network, x = network.to(dtype), x.to(dtype)
    weights = cuda_network.pack_network(network.whole(), precision)
    lowered = cuda_network.lower(network.config, weights, tuple(x.shape), x.stride(), dtype, precision, gpu, result)
    memory, y = workspace(device, lowered.workspace_bytes), device.empty(*lowered.shape, dtype=dtype)
    buffers = [memory, y, device.tensor(x), *(device.tensor(t) for t in weights.tensors)]
    results = play(device, lowered.program, buffers, gpu, **simulator)
    assert not memory[:COUNTER_BYTES].any(), "counters are not zero after the network"
    return (y.permute(0, 3, 1, 2) if result == "features" else y).cpu(), results, lowered


@functools.lru_cache(maxsize=1)  # XL's are a third of a gigabyte
def published(name: str) -> cuda_network.Weights:
    """The packed weights, zero, of a published network in fp16."""
    return cuda_network.pack_network(DeployedParNet(VARIANTS[name]).half().whole(), "ieee")


def variant(name: str, gpu: Gpu = A100) -> tuple[cuda_network.Lowered, list[Tensor]]:
    """A published network at 224² and batch 1: (program, packed tensors). For counting."""
    weights, shape, stride = published(name), (1, 3, 224, 224), (3 * 224 * 224, 224 * 224, 224, 1)
    lowered = cuda_network.lower(VARIANTS[name], weights, shape, stride, torch.float16, "ieee", gpu, "logits")
    return lowered, weights.tensors
