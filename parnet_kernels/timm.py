"""ParNet in timm: after `import parnet_kernels.timm`, `timm.create_model("parnet_s", …)` and all that it offers.

Models: parnet_s, parnet_m, parnet_l, parnet_xl and, for 32 × 32 images, parnet_cifar. timm has no entry point for other
packages, so the import is needed. `timm.utils.model.reparameterize_model(model)` gives the deployed form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parnet_kernels import ops
from parnet_kernels.checkpoint import load_checkpoint
from parnet_kernels.config import VARIANTS, Layer, ParNetConfig, cifar_config, layers, levels
from parnet_kernels.deployed import DeployedLayer, DeployedParNet
from parnet_kernels.model import ParNet
from parnet_kernels.preprocessing import IMAGENET_MEAN, IMAGENET_STD, INTERPOLATIONS, Preprocessing
from parnet_kernels.reference import per_channel

try:
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
    from timm.models._features import feature_take_indices
except ImportError as error:
    raise ImportError(f"parnet_kernels.timm needs `pip install parnet-kernels[timm]`: {error}") from error

#: Where timm may be told to find weights; this package publishes none.
_SOURCES = ("file", "state_dict", "url", "hf_hub_id")


class TimmParNet(nn.Module):
    """A ParNet, in `model`, with the interface of timm's models.

    Input [N, in_chans, H, W], any H, W ≥ 1; output logits [N, num_classes], without a classifier pooled features
    [N, P], with `global_pool=""` the last map.

    Args:
        config: which ParNet.
        global_pool: "avg"; or "", which leaves the last map as it is and goes with `num_classes=0` only.
        drop_rate: probability of dropout before the classifier; None: the configuration's.
        overrides: fields of ParNetConfig to replace (num_classes, in_chans, activation, …).

    Raises:
        ValueError: for another `global_pool`, or a configuration that is not possible.
    """

    model: ParNet | DeployedParNet

    def __init__(
        self, config: ParNetConfig, global_pool: str = "avg", drop_rate: float | None = None, **overrides: Any
    ) -> None:
        super().__init__()
        if drop_rate is not None:
            overrides["dropout"] = drop_rate
        self.model = ParNet(config.replace(**overrides))
        self.grad_checkpointing = False
        self.feature_info = _feature_info(self.config)
        self._set_pool(global_pool)

    @property
    def config(self) -> ParNetConfig:
        return self.model.config

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def in_chans(self) -> int:
        return self.config.in_chans

    @property
    def num_features(self) -> int:
        return self.model.num_features

    @property
    def head_hidden_size(self) -> int:
        return self.model.num_features

    def _set_pool(self, global_pool: str) -> None:
        if global_pool not in ("avg", "") or (not global_pool and self.num_classes):
            raise ValueError(f'`global_pool` must be "avg", or "" with `num_classes=0`, got {global_pool!r}')
        self.global_pool = global_pool

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """For learning rates that decay with the layer: a parameter's name → its depth, that of the classifier the
        largest. coarse: 0 for the stem, 1 for the streams, 2 for what follows them.
        """
        depth = {layer.name: i for i, level in enumerate(levels(self.config)) for layer in level}
        for layer in layers(self.config):
            if layer.kind == "fusion_se":  # its BatchNorms stand beside its block
                depth[layer.name.rpartition(".")[0]] = depth[layer.name]
        parts = {"inits": 0, "streams": 1, "downsamples_2": 2, "combine": 2}

        def group(name: str) -> float:
            words = name.removeprefix("model.").split(".")
            if coarse:
                return parts.get(words[0], float("inf"))
            found = (depth.get(".".join(words[:n])) for n in range(len(words), 0, -1))
            return next((float(d) for d in found if d is not None), float("inf"))

        return group

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training keeps the inputs of layers only, and computes the rest again for the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The linear layer, or an identity; of the deployed form, whose classifier is part of its last call, too."""
        return self.model.get_classifier() if isinstance(self.model, ParNet) else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one; 0: none.

        Raises:
            RuntimeError: for the deployed form.
        """
        if not isinstance(self.model, ParNet):
            raise RuntimeError("reset_classifier: a deployed ParNet keeps its classifier; reset it before deploying")
        self.model.reset_classifier(num_classes)
        if global_pool is not None or num_classes:
            self._set_pool("avg" if global_pool is None else global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of `feature_info`: stem, each stream but the last, what all streams make, the last map.

        Args:
            x: images.
            indices: which of them, by number; an integer: that many last ones; None: all.
            norm: has no meaning here, maps are activations.
            stop_early: compute no more than they need.
            output_fmt: "NCHW".
            intermediates_only: return the list of maps alone, not (last map, list).
        """
        if output_fmt != "NCHW":
            raise ValueError(f'`output_fmt` must be "NCHW", got {output_fmt!r}')
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        names = [self.feature_info[i]["layer"] for i in taken]
        made, last = self._maps(x, set(names), stop_early or intermediates_only)
        found = [made[name] for name in names]
        return found if intermediates_only else (last, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the classifier if `prune_head`; returns the indices, counted from the first map."""
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        if prune_head and isinstance(self.model, ParNet):
            self.reset_classifier(0, "")
        return taken

    def _maps(self, x: Tensor, wanted: set[str], stop: bool) -> tuple[dict[str, Tensor], Tensor]:
        """(the maps of the layers named, the last map that was computed); stop: at the last one named."""
        made, missing = {"image": x}, set(wanted)
        graph = layers(self.config)
        uses = {name: i for i, layer in enumerate(graph) for name in layer.inputs}
        inputs_of = dict(made)  # what later layers read: a deployed layer's output after the next one's BatchNorm
        for i, layer in enumerate(graph):
            inputs = [inputs_of[name] for name in layer.inputs]
            made[layer.name], inputs_of[layer.name] = self._layer(layer, inputs, layer.name in wanted)
            missing.discard(layer.name)
            if stop and not missing:
                break
            for name in {*layer.inputs} - wanted:
                if uses[name] == i:
                    del made[name], inputs_of[name]
        return made, made[layer.name]

    def _layer(self, layer: Layer, inputs: list[Tensor], wanted: bool) -> tuple[Tensor, Tensor]:
        """(its map, what later layers read)."""
        network = self.model
        if isinstance(network, ParNet):

            def run(*maps: Tensor) -> Tensor:
                return network.run_layer(layer.name, *maps)

            again = self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_scripting()
            y = checkpoint(run, *inputs, use_reentrant=False) if again else run(*inputs)
            return y, y
        if layer.kind == "fusion_se":
            slots = [name.replace(".", "_") for name in layer.inputs]
            affines = network.affines
            inputs = [affines[s](x) if s in affines else x for s, x in zip(slots, inputs, strict=True)]
        module = network.layers[layer.name.replace(".", "_")]
        if not wanted or "out_scale" not in getattr(module, "names", ()):
            y = module(*inputs)
            return y, y
        assert isinstance(module, DeployedLayer)
        arguments = module.arguments()
        scale, shift = (per_channel(arguments.pop(name)) for name in ("out_scale", "out_shift"))
        options: dict[str, Any] = {} if module.kind == "repvgg_sse" else {"stride": module.stride}
        y = getattr(ops, module.kind)(*inputs, **arguments, activation=module.activation, **options)
        return y, y * scale + shift

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, [N, P, ⌈H/32⌉, ⌈W/32⌉] in the ImageNet variants."""
        return self._maps(x, set(), False)[1] if self.grad_checkpointing else self.model.forward_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map → logits, or pooled features if `pre_logits` or without a classifier, or itself."""
        return self.model.forward_head(x, pre_logits) if self.global_pool else x

    def forward(self, x: Tensor) -> Tensor:
        if self.global_pool and not self.grad_checkpointing:
            return self.model(x)  # of the deployed form one call
        return self.forward_head(self.forward_features(x))

    def describe(self, cfg: Mapping[str, Any]) -> Self:
        """This model, whose network says how pictures become inputs and what its classes are, as timm says it."""
        channels, (height, width) = self.in_chans, cfg["input_size"][-2:]
        if channels == len(cfg["mean"]) == 3 and cfg["interpolation"] in INTERPOLATIONS:
            mean, std = tuple(map(float, cfg["mean"])), tuple(map(float, cfg["std"]))
            self.model.preprocessing = Preprocessing((height, width), cfg["crop_pct"], cfg["interpolation"], mean, std)
        names = cfg.get("label_names")
        if names and len(names) == self.num_classes:
            self.model.class_names = names
        return self


def _feature_info(config: ParNetConfig) -> list[dict[str, Any]]:
    graph = {layer.name: layer for layer in layers(config)}
    reduction = {"image": 1}
    for layer in graph.values():
        reduction[layer.name] = reduction[layer.inputs[0]] * layer.stride
    ends = [f"streams.{s}.{config.num_blocks[s] - 2}" for s in range(max(1, config.streams - 1))]
    ends = [end if end in graph else "inits.0.1" if s == 0 else f"inits.{s}" for s, end in enumerate(ends)]
    names = [name for name in ("inits.0.0", *ends, "combine.2", "combine.3") if name in graph]
    return [
        {
            "num_chs": graph[name].out_channels,
            "reduction": reduction[name],
            "module": f"model.{name}",
            "layer": name,
        }
        for name in names
    ]


def _filter(state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The weights of any training checkpoint, by the names that they have in timm's model."""
    return {f"model.{name}": t for name, t in load_checkpoint(state).state_dict().items()}


def _create(variant: str, config: ParNetConfig, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    given = options.get("pretrained_cfg")
    cfg = dict(given) if isinstance(given, Mapping) else vars(given) if hasattr(given, "__dict__") else {}
    cfg |= options.get("pretrained_cfg_overlay") or {}
    if pretrained and not any(cfg.get(source) is not None for source in _SOURCES):
        raise RuntimeError(
            f"{variant}: parnet_kernels publishes no weights. With a file of the authors (releases of "
            f"imankgoyal/NonDeepNetworks) or of your own: timm.create_model({variant!r}, pretrained=True, "
            "pretrained_cfg_overlay=dict(file=…))"
        )
    count = len(_feature_info(config))
    model = build_model_with_cfg(
        TimmParNet,
        variant,
        pretrained,
        pretrained_filter_fn=_filter,
        feature_cfg={"out_indices": tuple(range(count)), "feature_cls": "getter"},
        config=config,
        **options,
    )
    for module in model.modules():
        if isinstance(module, TimmParNet):
            module.describe(model.pretrained_cfg)
    return model


def _cfg(size: int, pool: int, classes: int = 1000, crop: float = 0.875, pooled: bool = True) -> dict[str, Any]:
    first, point = "model.inits.0.0.block", "rbr_1x1.1.conv" if pooled else "rbr_1x1.conv"
    return {
        "url": "",
        "input_size": (3, size, size),
        "num_classes": classes,
        "pool_size": (pool, pool),
        "crop_pct": crop,
        "interpolation": "bilinear",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "first_conv": tuple(f"{first}.{conv}" for conv in ("rbr_dense.conv", point, "se.cvsig.conv")),
        "classifier": "model.head.fc",
        "license": "bsd-3-clause",
        "paper_name": "Non-deep Networks",
        "paper_ids": "arXiv:2110.07641",
    }


default_cfgs = generate_default_cfgs(
    {
        **{f"parnet_{variant}": _cfg(224, 7) for variant in VARIANTS},
        "parnet_cifar": _cfg(32, 8, classes=10, crop=1.0, pooled=False),
    }
)


@register_model
def parnet_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ParNet-S."""
    return _create("parnet_s", VARIANTS["s"], pretrained, kwargs)


@register_model
def parnet_m(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ParNet-M."""
    return _create("parnet_m", VARIANTS["m"], pretrained, kwargs)


@register_model
def parnet_l(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ParNet-L."""
    return _create("parnet_l", VARIANTS["l"], pretrained, kwargs)


@register_model
def parnet_xl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ParNet-XL."""
    return _create("parnet_xl", VARIANTS["xl"], pretrained, kwargs)


@register_model
def parnet_cifar(pretrained: bool = False, width: int = 32, head_width: int | None = None, **kwargs: Any) -> nn.Module:
    """ParNet for 32 × 32 images; see `config.cifar_config`."""
    return _create("parnet_cifar", cifar_config(width, head_width), pretrained, kwargs)
