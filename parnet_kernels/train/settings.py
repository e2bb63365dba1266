"""What a training run depends on: one dataclass, whose fields are the options of `parnet train` and the keys of its
YAML files; and the recipes.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parnet_kernels.config import VARIANTS, ParNetConfig, cifar_config, with_streams
from parnet_kernels.preprocessing import COLORS, INTERPOLATIONS

Check = Callable[[Any], bool]
MOST = 1e9  # of numbers that have no other bound


def _field(default: Any, help: str, requirement: str = "", check: Check | None = None, run: bool = False) -> Any:
    """run: says where and how it runs, not what is learned; may differ when a run is resumed (of data, the path)."""
    return field(default=default, metadata={"help": help, "requirement": requirement, "check": check, "run": run})


def _at_least(least: float) -> tuple[str, Check]:
    return f"be ≥ {least:g} and ≤ {MOST:g}", lambda v: least <= v <= MOST


def _between(least: float, most: float) -> tuple[str, Check]:
    return f"be in {least:g}…{most:g}", lambda v: least <= v <= most


def _one_of(*allowed: str) -> tuple[str, Check]:
    return f"be one of {', '.join(allowed)}", lambda v: v in allowed


_above_0: tuple[str, Check] = ("be > 0", lambda v: v > 0)
MODELS = (*VARIANTS, "cifar")


@dataclass(frozen=True)
class Settings:
    """A training run. Fields are documented by `parnet train --help`.

    Raises:
        ValueError: a field is not possible; the text names it.
    """

    data: str = _field("", "Pictures: a folder in torchvision's layout, a zip or tar of one, or digits.", run=True)
    recipe: str = _field(
        "imagenet", "Where the other settings come from: imagenet or cifar.", *_one_of("imagenet", "cifar")
    )
    out: str = _field("out/train", "Folder for checkpoints and logs.", run=True)

    model: str = _field("s", "The network: s, m, l, xl, or cifar (for 32×32 pixels).", *_one_of(*MODELS))
    width: int = _field(32, "Channels of the first stream, of the network cifar.", *_at_least(1))
    streams: int = _field(3, "Parallel streams.", *_between(1, 6))
    activation: str = _field(
        "auto", "silu, relu, or auto: that of --init, else silu.", *_one_of("auto", "silu", "relu")
    )
    dropout: float = _field(0.0, "Probability before the classifier.", "be in [0, 1)", lambda v: 0 <= v < 1)
    init: str = _field("", "Checkpoint to start from: its network, with a new classifier for other classes.")

    size: int = _field(224, "Pixels of the square that the network sees.", *_between(1, 8192))
    crop: float = _field(0.875, "That square's share of the resized picture, in validation.", *_between(0.01, 1))
    interpolation: str = _field(
        "bilinear", f"Filter that resizes: {', '.join(INTERPOLATIONS)}.", *_one_of(*INTERPOLATIONS)
    )
    color: str = _field("auto", "rgb, bgr, gray, or auto: that of --init, else rgb.", *_one_of("auto", *COLORS))
    val_fraction: float = _field(0.1, "Share of each class for validation, if the data has no such part.",
                                 "be in [0, 1)", lambda v: 0 <= v < 1)  # fmt: skip
    limit: int = _field(0, "Training pictures of each class, the first in order of name; 0: all.", *_at_least(0))

    crop_scale: float = _field(0.08, "Least share of the area in a random resized crop; 0: none.", *_between(0, 1))
    pad: int = _field(0, "Pixels around the picture before a random crop, where crop_scale is 0.", *_between(0, 512))
    flip: float = _field(0.5, "Probability of a left-right flip.", *_between(0, 1))
    randaugment: int = _field(9, "Magnitude of RandAugment, two operations; 0: none.", *_between(0, 30))
    erase: float = _field(0.2, "Probability of random erasing.", *_between(0, 1))

    epochs: int = _field(120, "Passes over the pictures.", *_at_least(1))
    cooldown: int = _field(10, "Further epochs, at the lowest learning rate.", *_at_least(0))
    warmup: float = _field(0.0, "Epochs of linear warm-up, among --epochs.", *_at_least(0))
    batch: int = _field(1024, "Pictures a step, over all processes.", *_at_least(1))
    accumulate: int = _field(1, "Parts in which a process takes its pictures of a step.", *_at_least(1))
    lr_base: float = _field(0.1, "Peak learning rate of a batch of 256; in proportion for others.", *_above_0)
    lr_min: float = _field(1e-5, "Learning rate at the end of the cosine.", *_at_least(0))
    momentum: float = _field(0.9, "Nesterov momentum.", "be in [0, 1)", lambda v: 0 <= v < 1)
    weight_decay: float = _field(1e-4, "On weights of convolutions and of the classifier only.", *_at_least(0))
    label_smoothing: float = _field(0.1, "Share of the target for all classes.", "be in [0, 1)", lambda v: 0 <= v < 1)
    ema: float = _field(0.9999, "Decay of the average of weights, which is validated; 0: none.",
                        "be in [0, 1)", lambda v: 0 <= v < 1)  # fmt: skip
    seed: int = _field(0, "Of weights, order and augmentation.", *_between(0, 2**31 - 1))
    sync_bn: bool = _field(False, "BatchNorm over the pictures of all processes.")
    amp: bool = _field(False, "bfloat16 where PyTorch's autocast has it.")

    device: str = _field("auto", "cpu, cuda, or auto: cuda if there is one.", *_one_of("auto", "cpu", "cuda"), run=True)
    threads: int = _field(0, "CPU threads; 0: PyTorch's choice.", *_between(0, 1024), run=True)
    workers: int = _field(0, "Processes that read pictures, for each process that trains.", *_between(0, 256), run=True)
    log_every: int = _field(20, "Steps between lines of the step log.", *_at_least(1), run=True)
    save_every: int = _field(0, "Steps between checkpoints besides those of epochs; 0: none.", *_at_least(0), run=True)
    tensorboard: bool = _field(True, "Logs for TensorBoard, if tensorboardX is installed.", run=True)
    deploy: bool = _field(
        False, "At the end, write the deployed network and compare it with the trained one.", run=True
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, check = getattr(self, f.name), f.metadata["check"]
            if type(value) is int and f.type == "float":
                object.__setattr__(self, f.name, value := float(value))
            if type(value).__name__ != f.type or (isinstance(value, float) and not abs(value) < float("inf")):
                raise ValueError(f"`{f.name}` must be {_KINDS[str(f.type)]}, got {value!r}")
            if check is not None and not check(value):
                raise ValueError(f"`{f.name}` must {f.metadata['requirement']}, got {value!r}")

        if self.warmup > self.epochs:
            raise ValueError(f"`warmup` must be ≤ `epochs`, {self.epochs}, got {self.warmup:g}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, of `steps` an epoch: linear warm-up, a cosine, then the lowest."""
        highest, done, warm = self.lr_base * self.batch / 256, step / steps, self.warmup
        if done < warm:
            return highest * (step + 1) / (warm * steps)
        if done >= self.epochs:
            return min(highest, self.lr_min)
        lowest = min(highest, self.lr_min)
        return lowest + (highest - lowest) * (1 + math.cos(math.pi * (done - warm) / (self.epochs - warm))) / 2

    def network(self, num_classes: int) -> ParNetConfig:
        """The configuration of the network, without `init`.

        Raises:
            ValueError: it is not possible.
        """
        config = cifar_config(self.width) if self.model == "cifar" else VARIANTS[self.model]
        return with_streams(config, self.streams).replace(
            in_chans=COLORS.get(self.color, 3),
            num_classes=num_classes,
            activation="silu" if self.activation == "auto" else self.activation,
            dropout=self.dropout,
        )

    def learned(self) -> dict[str, Any]:
        """The fields that decide what is learned: those that a resumed run must have too."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.metadata["run"]}


_KINDS = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text"}
FIELDS = {f.name: f for f in dataclasses.fields(Settings)}

#: What recipes set, where it is not the default. `imagenet`: the paper's, but for the learning rate, of which the paper
#: gives no number, and the published scripts one that is too small for SGD.
RECIPES: dict[str, dict[str, Any]] = {
    "imagenet": {},
    "cifar": {
        "model": "cifar", "size": 32, "crop": 1.0, "crop_scale": 0.0, "pad": 4, "randaugment": 0, "erase": 0.0,
        "epochs": 30, "cooldown": 0, "warmup": 1.0, "batch": 128, "lr_base": 0.2, "lr_min": 0.0, "weight_decay": 5e-4,
        "ema": 0.995,
    },
}  # fmt: skip
#: What models set, after the recipe: regularisation that grows with the network.
_OF_MODEL: dict[str, dict[str, Any]] = {"l": {"dropout": 0.1, "erase": 0.4}, "xl": {"dropout": 0.1, "erase": 0.4}}
_OF_INIT = ("model", "width", "streams", "dropout")
#: Handwritten digits have no left and right to confuse, and are grey.
_DIGITS: dict[str, Any] = {"color": "gray", "flip": 0.0, "randaugment": 0}


def settings(given: Mapping[str, Any]) -> Settings:
    """Of what a user gave: the rest comes from the recipe, which is `cifar` for digits if none is named.

    Raises:
        ValueError: a name or value is not possible.
    """
    for name in given:
        if name not in FIELDS:
            raise ValueError(unknown(name))
    digits = given.get("data") == "digits"
    if given.get("init") and (of_init := [name for name in _OF_INIT if name in given]):
        raise ValueError(f"`{of_init[0]}` is that of the network that `init` names: leave it out")
    recipe = given.get("recipe", "cifar" if digits else "imagenet")
    if recipe not in RECIPES:
        raise ValueError(f"`recipe` must be one of {', '.join(RECIPES)}, got {recipe!r}")
    values = {"recipe": recipe, **RECIPES[recipe]}
    model = given.get("model", values.get("model", FIELDS["model"].default))
    if recipe == "imagenet":
        values |= _OF_MODEL.get(model, {}) if isinstance(model, str) else {}
    return Settings(**{**values, **(_DIGITS if digits else {}), **given})


def unknown(name: str) -> str:
    """What is said of a setting that there is not."""
    near = difflib.get_close_matches(name, FIELDS, 1, 0.5)
    return f"no setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else f" among {', '.join(FIELDS)}")


def parsed(name: str, text: str) -> Any:
    """The value of the field `name`, written as `text`.

    Raises:
        ValueError: it is of another kind.
    """
    kind = str(FIELDS[name].type)
    try:
        if kind == "bool":
            return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}[text.lower()]
        return {"int": int, "float": float, "str": str}[kind](text)
    except (ValueError, KeyError):
        raise ValueError(f"`{name}` must be {_KINDS[kind]}, got {text!r}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file: a mapping of fields to values. Errors name the line.

    Raises:
        ImportError: PyYAML is not installed.
        OSError: the file cannot be read.
        ValueError: it is no such mapping, or a name or value is not possible.
    """
    import yaml

    if path.exists() and not path.is_file():  # a pipe would block
        raise ValueError(f"{path} is not a file")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{where}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}, line {root.start_mark.line + 1}: expected lines such as `epochs: 30`")
    found: dict[str, Any] = {}
    for key, value in root.value:
        where, name = f"{path}, line {key.start_mark.line + 1}", str(key.value)
        if not isinstance(key, yaml.ScalarNode) or name not in FIELDS:
            raise ValueError(f"{where}: {unknown(name)}")
        if name in found:
            raise ValueError(f"{where}: {name!r} stands twice")
        if not isinstance(value, yaml.ScalarNode):
            raise ValueError(f"{where}: `{name}` must be {_KINDS[str(FIELDS[name].type)]}")
        try:
            found[name] = parsed(name, value.value)
            probe = {"data": found[name]} if name == "data" else {name: found[name]}
            Settings(**probe)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return found


def written(values: Settings) -> str:
    """As a YAML file, which `read_yaml` reads, and of which `settings` makes the same."""
    names = [name for name in FIELDS if not (values.init and name in _OF_INIT)]
    lines = [f"{name}: {json.dumps(getattr(values, name), ensure_ascii=False)}" for name in names]
    return "\n".join(lines) + "\n"
