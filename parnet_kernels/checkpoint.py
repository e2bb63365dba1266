"""Reading the published training checkpoints, and reading and writing our own safetensors files.

Nothing in a file is executed: see `archive`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from parnet_kernels.archive import CheckpointError as CheckpointError
from parnet_kernels.archive import read_archive
from parnet_kernels.checks import DTYPES
from parnet_kernels.config import VARIANTS, ParNetConfig, layers
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.files import write_whole
from parnet_kernels.model import ParNet
from parnet_kernels.preprocessing import Described
from parnet_kernels.quantized import QuantizedParNet


def load_checkpoint(
    path_or_dict: str | Path | Mapping[str, Any],
    ema: bool = False,
    activation: str | None = None,
    *,
    num_classes: int | None = None,
    ignore_classes: bool = False,
) -> ParNet:
    """A `ParNet` (in evaluation mode, on the CPU) from a training checkpoint.

    Args:
        path_or_dict: a file written by torch.save (as the published ones) or by `save` (.safetensors), or what such a
            file holds: a state dict, or a dict with one under `state_dict`, `model`, `net` (of
            averages, `state_dict_ema` or `ema`). Prefixes of wrappers (`module.`,
            `_orig_mod.`, `model.`, in any order) are taken off. Preprocessing and class names are those that `save`
            wrote, or that `model.description()` gave beside the state dict.
        ema: take the exponential moving average of the weights.
        activation: "silu" or "relu"; None: what the file says (ours its configuration, the published ones the options
            of the training script), else SiLU. The weights can only prove SiLU, by a negative running mean of an
            activated map: nothing proves ReLU.
        num_classes: if not that of the file, the classifier is replaced by a new one, freshly initialised, without
            class names; 0: by none.
        ignore_classes: read the weights of a file that also holds objects of other classes than tensors, numbers, texts
            and containers, and leave those objects out. No code of theirs runs in either case.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file or dict is truncated, of another kind or of another network, declares more than it
            holds, holds classes that may not be loaded, has no EMA weights, or contradicts `activation`.
        ValueError: for another `activation` or `num_classes`.
    """
    if activation not in (None, "silu", "relu"):
        raise ValueError(f"load_checkpoint: `activation` must be 'silu', 'relu' or None, got {activation!r}")
    if num_classes is not None and (type(num_classes) is not int or num_classes < 0):
        raise ValueError(f"load_checkpoint: `num_classes` must be an integer ≥ 0 or None, got {num_classes!r}")
    if isinstance(path_or_dict, Mapping):
        name, content, config, said = "the given dict", path_or_dict, None, path_or_dict
    else:
        name = str(path_or_dict)
        content, config, said = _read(Path(path_or_dict), "training", ignore_classes)
    state = _state_dict(content, ema, name)
    if config is None:
        config = infer_config(state, name)
        config = config.replace(activation=_activation(content, state, activation, name))
    elif activation not in (None, config.activation):
        raise CheckpointError(f"{name} was saved with activation {config.activation!r}, asked for {activation!r}")
    with _somewhere():
        model = ParNet(_fits(config, state, name))
    _load(model, state, name)
    _describe(model, said, name)
    if num_classes not in (None, model.num_classes):
        model.reset_classifier(num_classes)
    return model.eval()


def load_deployed(path: str | Path) -> DeployedParNet:
    """A `DeployedParNet` from a file written by `save`.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is truncated, of another kind, or holds a training form.
    """
    state, config, said = _read(Path(path), "deployed")
    if config is None:
        raise CheckpointError(f"{path} is not a deployed ParNet; make one with `parnet convert --deployed`")
    checked = _checked(state, str(path))
    if "head_weight" not in checked:
        raise CheckpointError(f"{path} is not a deployed ParNet: it has no entry 'head_weight'")
    dtype = checked["head_weight"].dtype
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: entry 'head_weight' must be one of {DTYPES}, got {dtype}")
    with _somewhere():
        model = DeployedParNet(_fits(config, checked, str(path))).to(dtype)
    _load(model, checked, str(path))
    return _describe(model, said, str(path))


def load_model(
    path: str | Path, ema: bool = False, activation: str | None = None, *, ignore_classes: bool = False
) -> DeployedParNet:
    """A network for inference from either form: a deployed file as it is, a training checkpoint folded.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: as `load_checkpoint`; or `ema` is asked of a deployed file, or an activation that it has not.
    """
    if Path(path).suffix == ".safetensors" and read_metadata(Path(path)).get("parnet_form") == "deployed":
        if ema:
            raise CheckpointError(f"{path} holds a deployed ParNet, which has no EMA weights")
        network = load_deployed(path)
        if activation not in (None, network.config.activation):
            found = network.config.activation
            raise CheckpointError(f"{path} was saved with activation {found!r}, asked for {activation!r}")
        return network
    return load_checkpoint(path, ema, activation, ignore_classes=ignore_classes).deploy()


def load_quantized(path: str | Path) -> QuantizedParNet:
    """An int8 network from a file written by `save`.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is truncated, of another kind, or holds another form.
    """
    state, config, said = _read(Path(path), "int8")
    if config is None:
        raise CheckpointError(f"{path} is not an int8 ParNet; make one with `parnet quantize`")
    checked = _checked(state, str(path))
    with _somewhere():
        model = QuantizedParNet(_fits(config, checked, str(path)))
    wrong = [k for k, t in model.state_dict().items() if k in checked and checked[k].dtype != t.dtype]
    if wrong:
        raise CheckpointError(f"{path}: entry {wrong[0]!r} must not be {checked[wrong[0]].dtype}")
    _load(model, checked, str(path))
    return _describe(model, said, str(path))


def load_network(
    path: str | Path, ema: bool = False, activation: str | None = None, *, ignore_classes: bool = False
) -> DeployedParNet | QuantizedParNet:
    """A network for inference from any file: an int8 network as it is, others as `load_model`, whose errors it has."""
    path = Path(path)
    if path.suffix != ".safetensors" or read_metadata(path).get("parnet_form") != "int8":
        return load_model(path, ema, activation, ignore_classes=ignore_classes)
    network = load_quantized(path)
    if ema:
        raise CheckpointError(f"{path} holds an int8 ParNet, which has no EMA weights")
    if activation not in (None, network.config.activation):
        raise CheckpointError(
            f"{path} was saved with activation {network.config.activation!r}, asked for {activation!r}"
        )
    return network


def save(model: ParNet | DeployedParNet | QuantizedParNet, path: str | Path) -> None:
    """Writes a model of any form as safetensors, with its configuration, preprocessing and class names. The file
    appears when it is complete, with the permissions of any new file. Wrappers (torch.compile, DataParallel,
    AveragedModel) are taken off.

    Raises:
        OSError: the file cannot be written.
        TypeError: for another module.
    """
    write_whole(path, serialized(model))


def serialized(model: ParNet | DeployedParNet | QuantizedParNet) -> bytes:
    """The content of the file that `save` writes."""
    while not isinstance(model, ParNet | DeployedParNet | QuantizedParNet):
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if not isinstance(inner, torch.nn.Module):
            raise TypeError(
                f"save: `model` must be a ParNet, DeployedParNet or QuantizedParNet, got a {type(model).__name__}"
            )
        model = inner
    forms = {ParNet: "training", DeployedParNet: "deployed", QuantizedParNet: "int8"}
    form = next(name for kind, name in forms.items() if isinstance(model, kind))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in state.items()}  # safetensors refuses tensors that share memory
    metadata = {"parnet_form": form, "parnet_config": json.dumps(asdict(model.config)), **model.description()}
    return serialize(state, metadata)


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
    if streams > len(state):
        raise CheckpointError(f"{name} is not a ParNet checkpoint: streams are missing between those that it has")
    if streams < 1:
        raise CheckpointError(f"{name} is not a ParNet checkpoint: it has no entries 'inits.0.*'")
    planes = [shape(f"inits.0.1.{dense}")[0]]
    planes += [shape(f"inits.{s}.{dense}")[0] for s in range(1, streams)]
    pointwise = "combine.3.block.dense.conv.weight" in state
    planes.append(shape("combine.3.block.dense.conv.weight" if pointwise else f"combine.3.{dense}")[0])
    if any(_count(state, rf"streams\.{s}\.(\d+)\.") > len(state) for s in range(streams)):
        raise CheckpointError(f"{name} is not a ParNet checkpoint: blocks are missing between those that it has")
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


def _activation(content: Mapping[str, Any], state: Mapping[str, Tensor], asked: str | None, name: str) -> str:
    """φ: what is asked for, else what the file says, else SiLU. A negative mean of an activated map proves SiLU;
    nothing proves ReLU, as maps may have positive means under SiLU too.
    """
    pattern = re.compile(
        r"(streams\.\d+\.\d+\.block\.rbr_identity|(downsamples_2\.\d+|combine)\.0\.b[12])\.running_mean"
    )
    means = [tensor.float() for key, tensor in state.items() if pattern.fullmatch(key)]
    negative = any(bool((mean < 0).any()) for mean in means)
    if negative and asked == "relu":
        raise CheckpointError(f"{name} was not trained with ReLU: running means of activated maps are negative")
    if asked is not None or negative:
        return asked or "silu"
    # The authors' script makes SiLU of an element "swish"; their configurations nest the list, which makes ReLU.
    options = content.get("args")
    options = options if isinstance(options, Mapping) else getattr(options, "__dict__", {})
    branches = options.get("additional_branches")
    return "relu" if isinstance(branches, list | tuple) and "swish" not in branches else "silu"


#: Where training scripts put the weights, and the names that wrappers put before those of their module.
_PLACES = {False: ("state_dict", "model", "model_state", "model_state_dict", "net"), True: ("state_dict_ema", "ema")}
_WRAPPERS = re.compile(r"((?:module|model|_orig_mod)\.)+")


def _state_dict(content: Mapping[str, Any], ema: bool, name: str) -> dict[str, Tensor]:
    """The weights, by their names without wrappers (DataParallel, torch.compile, AveragedModel, Lightning)."""
    found = [content[place] for place in _PLACES[ema] if isinstance(content.get(place), Mapping)]
    if ema and not found and "n_averaged" not in content:
        raise CheckpointError(f"{name} holds no EMA weights (`state_dict_ema`)")
    state = found[0] if found else content
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{name} holds no state dict: expected tensors by name, or a dict with `state_dict`")
    checked = _checked({key: value for key, value in state.items() if key != "n_averaged"}, name)
    wrapped = {key: value for key, value in checked.items() if _WRAPPERS.match(key)}
    if not wrapped:
        return checked
    return {_WRAPPERS.sub("", key, count=1): value for key, value in wrapped.items()}


def _fits(config: ParNetConfig, state: Mapping[str, Tensor], name: str) -> ParNetConfig:
    """`config`, if the file holds as many numbers as its weights: asked before anything of that size is made.

    Raises:
        CheckpointError: if it declares more than it holds.
    """
    held = sum(tensor.numel() for tensor in state.values())
    declared = config.planes[-1] * config.num_classes
    if sum(config.num_blocks) <= len(state):  # else the graph of layers itself would be large
        declared += sum(layer.in_channels * layer.out_channels for layer in layers(config))
    if declared > held or sum(config.num_blocks) > len(state):
        raise CheckpointError(f"{name} declares a larger network than it holds: {held} numbers in {len(state)} entries")
    return config


def _checked(state: Mapping[Any, Tensor], name: str) -> dict[str, Tensor]:
    """The state dict, if its entries have names and values that can be copied."""
    for key, value in state.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{name}: names of entries must be strings, got {key!r}")
        if value.is_nested:
            raise CheckpointError(f"{name}: entry {key!r} must be a dense tensor of real values, got a nested tensor")
        if value.is_meta or value.layout != torch.strided or value.is_quantized or value.is_complex():
            got = "a meta tensor" if value.is_meta else f"{value.dtype}, {value.layout}"
            raise CheckpointError(f"{name}: entry {key!r} must be a dense tensor of real values, got {got}")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(f"{name}: entry {key!r} must hold all its values, got an expanded tensor")
    return dict(state)


def _somewhere() -> torch.device:
    """Where a model of a file goes: the default device, but for "meta", which would lose the values."""
    device = torch.get_default_device()
    return torch.device("cpu") if device.type == "meta" else device


def _load(model: ParNet | DeployedParNet | QuantizedParNet, state: dict[str, Tensor], name: str) -> None:
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


_Network = TypeVar("_Network", bound=Described)


def _describe(model: _Network, said: Mapping[str, Any], name: str) -> _Network:
    try:
        return model.describe(said)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _read(
    path: Path, form: str, ignore_classes: bool = False
) -> tuple[Mapping[str, Any], ParNetConfig | None, Mapping[str, Any]]:
    """(content, configuration if the file is ours, what holds preprocessing and class names)."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    if path.suffix == ".safetensors":
        metadata = read_metadata(path)
        found = metadata.get("parnet_form", form)
        if found != form:
            raise CheckpointError(f"{path} holds a ParNet in {found} form, expected the {form} form")
        with safe_open(path, "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        config = metadata.get("parnet_config")
        return state, None if config is None else _config(config, path), metadata
    content = read_archive(path, ignore_classes)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a state dict or a dict with one")
    return content, None, content


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: it is truncated, or of another kind.
    """
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
    except (TypeError, ValueError, RecursionError) as error:
        requirement = "metadata `parnet_config` must hold the fields of a ParNetConfig as JSON"
        raise CheckpointError(f"{path}: {requirement}, got {text[:200]!r}: {error}") from error
