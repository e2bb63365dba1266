"""Reading the published training checkpoints, and reading and writing our own safetensors files.

Nothing in a file is executed: pickles are read by torch.load(weights_only=True), with argparse.Namespace (the training
script's options, which the published files contain) as the only class allowed besides tensors and containers.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parnet_kernels.checks import DTYPES
from parnet_kernels.config import VARIANTS, ParNetConfig
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.model import ParNet


class CheckpointError(ValueError):
    """A file or dict that is not a ParNet; the text names it and says what is wrong."""


def load_checkpoint(
    path_or_dict: str | Path | Mapping[str, Any], ema: bool = False, activation: str | None = None
) -> ParNet:
    """A `ParNet` (in evaluation mode, on the CPU) from a training checkpoint.

    Args:
        path_or_dict: a file written by torch.save (as the published ones) or by `save` (.safetensors), or what such a
            file holds: a state dict, or a dict with `state_dict` (and perhaps `state_dict_ema`).
        ema: take the exponential moving average of the weights.
        activation: "silu" or "relu"; None: read it off the weights. Both activations have the same state dict, but
            under ReLU no running mean of an activated map is negative.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file or dict is truncated, of another kind or of another network, holds classes that may
            not be loaded, has no EMA weights, or contradicts `activation`.
        ValueError: for another `activation`.
    """
    if activation not in (None, "silu", "relu"):
        raise ValueError(f"load_checkpoint: `activation` must be 'silu', 'relu' or None, got {activation!r}")
    if isinstance(path_or_dict, Mapping):
        name, content, config = "the given dict", path_or_dict, None
    else:
        name = str(path_or_dict)
        content, config = _read(Path(path_or_dict), "training")
    state = _state_dict(content, ema, name)
    if config is None:
        config = infer_config(state, name)
        config = config.replace(activation=_activation(state, activation, name))
    elif activation not in (None, config.activation):
        raise CheckpointError(f"{name} was saved with activation {config.activation!r}, asked for {activation!r}")
    model = ParNet(config)
    _load(model, state, name)
    return model.eval()


def load_deployed(path: str | Path) -> DeployedParNet:
    """A `DeployedParNet` from a file written by `save`.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is truncated, of another kind, or holds a training form.
    """
    state, config = _read(Path(path), "deployed")
    if config is None:
        raise CheckpointError(f"{path} is not a deployed ParNet; make one with `parnet convert --deployed`")
    checked = _checked(state, str(path))
    if "head_weight" not in checked:
        raise CheckpointError(f"{path} is not a deployed ParNet: it has no entry 'head_weight'")
    dtype = checked["head_weight"].dtype
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: entry 'head_weight' must be one of {DTYPES}, got {dtype}")
    model = DeployedParNet(config).to(dtype)
    _load(model, checked, str(path))
    return model


def load_model(path: str | Path, ema: bool = False, activation: str | None = None) -> DeployedParNet:
    """A network for inference from either form: a deployed file as it is, a training checkpoint folded.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: as `load_checkpoint`; or `ema` is asked of a deployed file, or an activation that it has not.
    """
    if Path(path).suffix == ".safetensors" and _metadata(Path(path)).get("parnet_form") == "deployed":
        if ema:
            raise CheckpointError(f"{path} holds a deployed ParNet, which has no EMA weights")
        network = load_deployed(path)
        if activation not in (None, network.config.activation):
            found = network.config.activation
            raise CheckpointError(f"{path} was saved with activation {found!r}, asked for {activation!r}")
        return network
    return load_checkpoint(path, ema, activation).deploy()


def save(model: ParNet | DeployedParNet, path: str | Path) -> None:
    """Writes a model of either form as safetensors, with its configuration.

    Raises:
        OSError: the file cannot be written.
    """
    form = "deployed" if isinstance(model, DeployedParNet) else "training"
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    try:
        save_file(state, path, {"parnet_form": form, "parnet_config": json.dumps(asdict(model.config))})
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def infer_config(state: Mapping[str, Tensor], name: str = "the state dict") -> ParNetConfig:
    """The configuration, from the shapes of a training state dict; activation left at its default."""

    def shape(key: str, dims: int = 4) -> torch.Size:
        if key not in state:
            raise CheckpointError(f"{name} is not a ParNet checkpoint: it has no entry {key!r}")
        found = state[key].shape
        if len(found) != dims:
            raise CheckpointError(f"{name}: entry {key!r} must have {dims} dimensions, got shape {list(found)}")
        return found

    dense = "block.rbr_dense.conv.weight"
    streams = _count(state, r"inits\.(\d+)\.")
    if streams < 2:
        raise CheckpointError(f"{name} is not a ParNet checkpoint: it has no entries 'inits.1.*'")
    planes = [shape(f"inits.0.1.{dense}")[0]]
    planes += [shape(f"inits.{s}.{dense}")[0] for s in range(1, streams)]
    pointwise = "combine.3.block.dense.conv.weight" in state
    planes.append(shape("combine.3.block.dense.conv.weight" if pointwise else f"combine.3.{dense}")[0])
    num_classes = shape("head.fc.weight", 2)[0] if "head.fc.weight" in state else 0
    stem_width, in_chans = shape(f"inits.0.0.{dense}")[:2]
    try:
        config = ParNetConfig(
            tuple(planes),
            tuple(1 + _count(state, rf"streams\.{s}\.(\d+)\.") for s in range(streams)),
            in_chans=in_chans,
            stem_width=stem_width,
            stem_stride=2 if "inits.0.0.block.rbr_1x1.1.conv.weight" in state else 1,
            pointwise_head=pointwise,
            num_classes=num_classes,
        )
    except ValueError as error:
        raise CheckpointError(f"{name} is not a ParNet checkpoint: {error}") from error
    for variant in VARIANTS.values():  # what shapes do not tell: how the variant was trained
        if (variant.planes, variant.num_blocks, variant.stem) == (config.planes, config.num_blocks, config.stem):
            config = config.replace(dropout=variant.dropout)
    return config


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    found = (re.match(pattern, key) for key in state)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _activation(state: Mapping[str, Tensor], asked: str | None, name: str) -> str:
    """φ as the weights tell it: these are means of activated maps, never negative under ReLU."""
    pattern = re.compile(
        r"(streams\.\d+\.\d+\.block\.rbr_identity|(downsamples_2\.\d+|combine)\.0\.b[12])\.running_mean"
    )
    means = [tensor.float() for key, tensor in state.items() if pattern.fullmatch(key)]
    negative = any(bool((mean < 0).any()) for mean in means)
    trained = any(bool(mean.any()) for mean in means)
    if negative and asked == "relu":
        raise CheckpointError(f"{name} was not trained with ReLU: running means of activated maps are negative")
    if asked == "silu" and trained and not negative:
        warnings.warn(f"{name} looks trained with ReLU: no running mean of an activated map is negative", stacklevel=3)
    return asked or ("relu" if trained and not negative else "silu")


def _state_dict(content: Mapping[str, Any], ema: bool, name: str) -> dict[str, Tensor]:
    key = "state_dict_ema" if ema else "state_dict"
    if ema and key not in content:
        raise CheckpointError(f"{name} holds no EMA weights (`state_dict_ema`)")
    state = content.get(key, content)
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{name} holds no state dict: expected tensors by name, or a dict with `state_dict`")
    return {key.removeprefix("module."): value for key, value in _checked(state, name).items()}


def _checked(state: Mapping[Any, Tensor], name: str) -> dict[str, Tensor]:
    """The state dict, if its entries have names and values that can be copied."""
    for key, value in state.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{name}: names of entries must be strings, got {key!r}")
        if value.is_meta or value.layout != torch.strided or value.is_quantized or value.is_complex():
            got = "a meta tensor" if value.is_meta else f"{value.dtype}, {value.layout}"
            raise CheckpointError(f"{name}: entry {key!r} must be a dense tensor of real values, got {got}")
    return dict(state)


def _load(model: ParNet | DeployedParNet, state: dict[str, Tensor], name: str) -> None:
    own = model.state_dict()
    for key, value in own.items():
        if key.endswith("num_batches_tracked"):  # an EMA averages this counter too, and old files lack it
            state[key] = value
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    problems = [
        f"{len(keys)} {what}, the first is {keys[0]!r}"
        for keys, what in ((missing, "missing"), (unexpected, "unexpected"), (sorted(wrong), "of the wrong shape"))
        if keys
    ]
    if problems:
        raise CheckpointError(f"{name} does not fit a ParNet of its shapes; entries: {'; '.join(problems)}")
    model.load_state_dict(state)


def _read(path: Path, form: str) -> tuple[Mapping[str, Any], ParNetConfig | None]:
    """(content, configuration if the file is ours)."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    if path.suffix == ".safetensors":
        metadata = _metadata(path)
        found = metadata.get("parnet_form", form)
        if found != form:
            raise CheckpointError(f"{path} holds a ParNet in {found} form, expected the {form} form")
        with safe_open(path, "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        config = metadata.get("parnet_config")
        return state, None if config is None else _config(config, path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"Unsupported (?:global|class)[^\n]*|GLOBAL [\w.]+", str(error))
        reason = f"it needs {refused[0]}, which may not be loaded" if refused else "it is not a PyTorch checkpoint"
        raise CheckpointError(f"cannot read {path}: {reason}") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"cannot read {path}: truncated, or not a PyTorch checkpoint ({error})") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a state dict or a dict with one")
    return content, None


def _metadata(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"cannot read {path}: truncated, or not a safetensors file ({error})") from error


def _config(text: str, path: Path) -> ParNetConfig:
    """The configuration in the metadata of a file of ours."""
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise TypeError(f"not an object but a {type(fields).__name__}")
        config = ParNetConfig(**fields)
        counts = (*config.planes, *config.num_blocks, config.in_chans, config.stem, config.stem_stride)
        if any(type(n) is not int for n in (*counts, config.num_classes)) or type(config.pointwise_head) is not bool:
            raise TypeError("widths and counts must be integers, `pointwise_head` true or false")
        return config
    except (TypeError, ValueError) as error:
        requirement = "metadata `parnet_config` must hold the fields of a ParNetConfig as JSON"
        raise CheckpointError(f"{path}: {requirement}, got {text[:200]!r}: {error}") from error
