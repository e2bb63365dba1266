"""ParNet in training form: parallel branches with BatchNorm, named as in the published checkpoints."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from parnet_kernels import training_block
from parnet_kernels.config import VARIANTS, Layer, ParNetConfig, cifar_config, layers
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.evaluated import convolution, norm, refuse
from parnet_kernels.preprocessing import Described
from parnet_kernels.reference import ACTIVATIONS, interleave, shuffle
from parnet_kernels.reparam import Affine, fold_gated_block, fold_identity_block
from parnet_kernels.training import pool


class _Holder(nn.Module):
    """Modules under given names: the published names have levels that do nothing."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class ConvBN(nn.Module):
    """Convolution without bias, then BatchNorm."""

    def __init__(self, c: int, k: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, k, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(k)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


def _fold_conv_bn(m: nn.Module, where: str, kernel: int, stride: int, groups: int) -> tuple[Tensor, Affine]:
    """Of a ConvBN: the weight of the convolution, and the affine map after it."""
    if type(m) is not ConvBN:
        refuse(where, f"is a {type(m).__name__}, not a ConvBN")
    weight, bias = convolution(m.conv, f"{where}.conv", kernel=kernel, stride=stride, groups=groups)
    scale, shift = norm(m.bn, f"{where}.bn", bias)
    return weight, Affine(scale, shift + scale * bias)


class AvgPool(nn.Module):
    """See `training.pool`."""

    def forward(self, x: Tensor) -> Tensor:
        return pool(x)


class Gate(nn.Module):
    """Single-layer squeeze-excitation: σ(conv1x1(mean_hw(x))) [N, K, 1, 1] (paper section 3.1)."""

    def __init__(self, c: int, k: int, groups: int) -> None:
        super().__init__()
        self.cvsig = _Holder(conv=nn.Conv2d(c, k, 1, groups=groups, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.cvsig.conv(x.mean((2, 3), keepdim=True)).sigmoid()


class Block(nn.Module):
    """RepVGG-SSE block (c = k, stride 1: with a skip) or gated block (otherwise); `groups` 2 in fusions.

    with skip: φ(BN(conv3x3(x)) + BN(conv1x1(x)) + z·gate(z)), z = BN(x)
    otherwise: φ((BN(conv3x3(x)) + BN(conv1x1(pooled x)))·2·gate(x))
    """

    def __init__(self, c: int, k: int, stride: int, groups: int, activation: str) -> None:
        super().__init__()
        self.stride = stride
        self.groups = groups
        self.activation = activation
        point = ConvBN(c, k, 1, groups=groups)
        self.rbr_dense = ConvBN(c, k, 3, stride, groups)
        self.rbr_1x1 = point if stride == 1 else nn.Sequential(AvgPool(), point)
        self.rbr_identity = nn.BatchNorm2d(c) if c == k and stride == 1 else None
        self.se = Gate(c, k, groups)

    def why_not_fused(self, x: Tensor) -> str | None:
        """The reason why the block runs as modules, not as one operator of the training form; or None."""
        return training_block.why_not(self, x, _FORWARDS)

    def forward(self, x: Tensor) -> Tensor:
        if self.why_not_fused(x) is None:
            y = training_block.run(self, x)
            return y if self.groups == 1 else shuffle(y)
        t = self.rbr_dense(x) + self.rbr_1x1(x)
        if self.rbr_identity is None:
            t = t * (2 * self.se(x))
        else:
            z = self.rbr_identity(x)
            t = t + z * self.se(z)
        t = ACTIVATIONS[self.activation](t)
        return t if self.groups == 1 else shuffle(t)

    def fold(self, where: str = "block") -> dict[str, Tensor]:
        """The arguments of the block's operator, in float64, from its running statistics. where: its name, for errors.

        Raises:
            FoldError: naming the module that cannot be folded.
        """
        groups, at = self.groups, f"{where}.rbr_1x1"
        dense = _fold_conv_bn(self.rbr_dense, f"{where}.rbr_dense", 3, self.stride, groups)
        point: Any = self.rbr_1x1
        if self.stride == 2:
            if not (isinstance(point, nn.Sequential) and len(point) == 2 and type(point[0]) is AvgPool):
                refuse(at, f"is a {type(point).__name__}, not average pooling and a ConvBN")
            point, at = point[1], f"{at}.1"
        branches = (*dense, *_fold_conv_bn(point, at, 1, 1, groups))
        if type(self.se) is not Gate:
            refuse(f"{where}.se", f"is a {type(self.se).__name__}, not a Gate")
        at = f"{where}.se.cvsig.conv"
        gate_weight, gate_bias = convolution(self.se.cvsig.conv, at, kernel=1, groups=groups)
        if not gate_bias.is_meta and gate_bias.any():
            refuse(at, "has a bias")
        if self.rbr_identity is None:
            return fold_gated_block(*branches, gate_weight, self.stride)
        identity = norm(self.rbr_identity, f"{where}.rbr_identity", dense[1].scale)
        return fold_identity_block(*branches, identity, gate_weight)


#: Of the classes that a block is made of.
_FORWARDS: training_block.Forwards = {cls: cls.forward for cls in (_Holder, ConvBN, AvgPool, Gate)}


class Pointwise(nn.Module):
    """φ(BN(conv1x1(x))): the last layer of the CIFAR form."""

    def __init__(self, c: int, k: int, activation: str) -> None:
        super().__init__()
        self.dense = ConvBN(c, k, 1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](self.dense(x))

    def fold(self, where: str = "block") -> dict[str, Tensor]:
        """weight [K, C, 1, 1] and bias [K] of the convolution, in float64; see `Block.fold`."""
        weight, (scale, shift) = _fold_conv_bn(self.dense, f"{where}.dense", 1, 1, 1)
        return {"weight": weight * scale[:, None, None, None], "bias": shift}


class MultiBatchNorm(nn.Module):
    """The BatchNorms of a fusion's inputs: b1 of the stream, b2 of what was fused so far."""

    def __init__(self, stream: int, fused: int) -> None:
        super().__init__()
        self.b1 = nn.BatchNorm2d(stream)
        self.b2 = nn.BatchNorm2d(fused)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.b1(x), self.b2(y)


_OF_FUSIONS: training_block.Forwards = {**_FORWARDS, **{cls: cls.forward for cls in (Block, MultiBatchNorm)}}


class _Named(nn.Module):
    """Holds a block as `block`: the published names have this level."""

    def __init__(self, block: Block | Pointwise) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class _Interleave(nn.Module):
    def forward(self, xs: tuple[Tensor, Tensor]) -> Tensor:
        return interleave(*xs)


class ParNet(Described):
    """ParNet (Non-deep Networks, arXiv 2110.07641) in training form.

    Args:
        variant: "s", "m", "l", "xl" or a ParNetConfig.
        overrides: fields of ParNetConfig to replace (num_classes, activation, in_chans, dropout, …).

    Input [N, in_chans, H, W], any H, W ≥ 1; output logits [N, num_classes]. Set `preprocessing` and `class_names` where
    they are known: files and the deployed network keep them.

    Raises:
        ValueError: for an unknown variant or a configuration that is not possible.
    """

    def __init__(self, variant: str | ParNetConfig = "s", **overrides: Any) -> None:
        super().__init__()
        if isinstance(variant, str):
            if variant not in VARIANTS:
                raise ValueError(
                    f"ParNet: `variant` must be one of {list(VARIANTS)} or a ParNetConfig, got {variant!r}"
                )
            variant = VARIANTS[variant]
        self.config = config = variant.replace(**overrides) if overrides else variant
        self._layers = layers(config)
        made = {layer.name: _Named(self._make(layer)) for layer in self._layers}
        self.inits = nn.ModuleList(
            [
                nn.Sequential(made["inits.0.0"], made["inits.0.1"]),
                *(made[f"inits.{s}"] for s in range(1, config.streams)),
            ]
        )
        self.streams = nn.ModuleList(
            nn.Sequential(*(made[f"streams.{s}.{i}"] for i in range(config.num_blocks[s] - 1)))
            for s in range(config.streams)
        )
        self.downsamples_2, self.combine = nn.ModuleList(), nn.Sequential()
        if config.streams > 1:
            fusions = (self._fusion(made, f"downsamples_2.{s}") for s in range(1, config.streams - 1))
            self.downsamples_2.extend([made["downsamples_2.0"], *fusions])
            self.combine.extend(self._fusion(made, "combine"))
        self.combine.add_module("3", made["combine.3"])
        self.num_features = config.planes[-1]
        self.head = _Holder(fc=self._classifier(config.num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _make(self, layer: Layer) -> Block | Pointwise:
        act = self.config.activation
        if layer.kind == "pointwise":
            return Pointwise(layer.in_channels, layer.out_channels, act)
        inputs = len(layer.inputs)
        return Block(inputs * layer.in_channels, layer.out_channels, layer.stride, inputs, act)

    def _fusion(self, made: dict[str, _Named], prefix: str) -> nn.Sequential:
        c = next(layer.in_channels for layer in self._layers if layer.name == f"{prefix}.2")
        return nn.Sequential(MultiBatchNorm(c, c), _Interleave(), made[f"{prefix}.2"])

    def _classifier(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    def block(self, name: str) -> Block | Pointwise:
        """The block of the layer `name` (see `config.layers`)."""
        module = self.get_submodule(f"{name}.block")
        if not isinstance(module, (Block, Pointwise)):
            refuse(f"{name}.block", f"is a {type(module).__name__}")
        return module

    def fusion_norm(self, name: str) -> MultiBatchNorm:
        """The BatchNorms of the inputs of the fusion layer `name`."""
        module = self.get_submodule(name.rpartition(".")[0] + ".0")
        assert isinstance(module, MultiBatchNorm)
        return module

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] → the last map [N, P, ⌈H/32⌉, ⌈W/32⌉] (ImageNet variants)."""
        made: dict[str, Tensor] = {"image": x}
        for layer in self._layers:
            made[layer.name] = self.run_layer(layer.name, *(made[name] for name in layer.inputs))
        return made[self._layers[-1].name]

    def run_layer(self, name: str, *maps: Tensor) -> Tensor:
        """The map of the layer `name` from those of its inputs: two for a fusion, else one."""
        if len(maps) == 1:
            return self.block(name)(*maps)
        if self.why_not_fused(name, *maps) is None:
            return training_block.run_fusion(self.block(name), self.fusion_norm(name), maps)
        return self.block(name)(interleave(*self.fusion_norm(name)(*maps)))

    def why_not_fused(self, name: str, *maps: Tensor) -> str | None:
        """The reason why the layer `name` runs as modules, not as one operator of the training form; or None."""
        block = self.block(name)
        if isinstance(block, Pointwise):
            return "a single 1×1 convolution has no operator"
        if len(maps) == 1:
            return block.why_not_fused(*maps)
        return training_block.why_not_fusion(block, self.fusion_norm(name), maps, _OF_FUSIONS)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map → logits [N, num_classes], or pooled features [N, P] if `pre_logits`."""
        x = F.dropout(x.mean((2, 3)), self.config.dropout, self.training)
        return x if pre_logits else self.head.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a new one, freshly initialised, whose classes have no names; 0: none."""
        self.class_names = None
        self.config = self.config.replace(num_classes=num_classes)
        reference = next(self.parameters())
        self.head.fc = self._classifier(num_classes).to(reference.device, reference.dtype)

    def deploy(self) -> DeployedParNet:
        """The network for inference, one operator a layer; this model is left as it is. See `DeployedParNet`.

        Weights that pruning, weight norm, spectral norm or another parametrization makes at each forward are those of
        the next forward in evaluation.

        Raises:
            FoldError (a ValueError): naming a module that has no exact folded form: a BatchNorm without running
                statistics, a hook or a forward of its own, a module of another class.
        """
        return DeployedParNet.from_training(self)

    fuse = deploy  # what timm's reparameterize_model calls


def parnet_s(**overrides: Any) -> ParNet:
    """ParNet-S: 19.1 M parameters and 4.7 GMACs at 224², folded."""
    return ParNet("s", **overrides)


def parnet_m(**overrides: Any) -> ParNet:
    """ParNet-M: 35.6 M parameters and 8.6 GMACs at 224², folded."""
    return ParNet("m", **overrides)


def parnet_l(**overrides: Any) -> ParNet:
    """ParNet-L: 54.9 M parameters and 13.3 GMACs at 224², folded."""
    return ParNet("l", **overrides)


def parnet_xl(**overrides: Any) -> ParNet:
    """ParNet-XL: 85.0 M parameters and 20.7 GMACs at 224², folded."""
    return ParNet("xl", **overrides)


def parnet_cifar(width: int = 32, num_classes: int = 10, head_width: int | None = None, **overrides: Any) -> ParNet:
    """ParNet for 32×32 images; see `config.cifar_config`."""
    return ParNet(cifar_config(width, head_width), num_classes=num_classes, **overrides)
