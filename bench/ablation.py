"""What the parts of ParNet are worth: networks that differ in one thing, trained alike, for `python -m bench ablation`.

The base is the CIFAR form with RepVGG-SSE blocks, SiLU and three streams. Every row is trained with every seed by the
steps and the schedule of `parnet train`, and its average of weights is scored once, at the end, on the validation
pictures. Seeds go first, so that a run that is stopped has as many of each row; one that is started again goes on.
"""

from __future__ import annotations

import csv
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parnet_kernels.config import cifar_config, with_streams
from parnet_kernels.model import Block, ParNet
from parnet_kernels.preprocessing import COLORS, Preprocessing
from parnet_kernels.train.augmentation import Augmentation
from parnet_kernels.train.batches import Feed, Training, Validation, training_parts, validation_parts
from parnet_kernels.train.learner import Learner
from parnet_kernels.train.ranks import Ranks
from parnet_kernels.train.settings import Settings
from parnet_kernels.train.sources import Pictures

Make = Callable[[int, int, int], nn.Module]  # width, channels of the picture, classes


class Constant(nn.Module):
    """In place of a gate: no gate."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> float:
        return self.value


class SqueezeExcitation(nn.Module):
    """The gate of squeeze-excitation, in the place of SSE: two layers, with a quarter of the channels between."""

    def __init__(self, c: int, k: int, groups: int) -> None:
        super().__init__()
        inner = groups * max(4, k // 4 // groups)
        self.layers = nn.Sequential(
            nn.Conv2d(c, inner, 1, groups=groups), nn.ReLU(), nn.Conv2d(inner, k, 1, groups=groups), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x.mean((2, 3), keepdim=True))
        return y


def parnet(streams: int = 3, activation: str = "silu", scale: float = 1.0, gate: str = "sse") -> Make:
    """gate: "sse"; "se"; or "none": the RepVGG block alone, with an ungated skip."""

    def make(width: int, channels: int, classes: int) -> nn.Module:
        config = with_streams(cifar_config(round(width * scale)), streams)
        model = ParNet(config.replace(in_chans=channels, num_classes=classes, activation=activation))
        for block in [m for m in model.modules() if isinstance(m, Block)] if gate != "sse" else []:
            conv = block.se.cvsig.conv
            if gate == "se":
                gates: nn.Module = SqueezeExcitation(conv.in_channels, conv.out_channels, conv.groups)
            else:  # blocks without a skip multiply by twice the gate
                gates = Constant(0.5 if block.rbr_identity is None else 1.0)
            block.add_module("se", gates)
        return model

    return make


class Basic(nn.Module):
    """The block of ResNets (arXiv 1512.03385): two 3×3 convolutions and a skip, which a 1×1 convolution projects."""

    def __init__(self, c: int, k: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(c, k, 3, stride, 1, bias=False), nn.BatchNorm2d(k), nn.ReLU(),
            nn.Conv2d(k, k, 3, 1, 1, bias=False), nn.BatchNorm2d(k),
        )  # fmt: skip
        self.skip = nn.Identity() if c == k and stride == 1 else nn.Sequential(
            nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet(width: int, channels: int, classes: int) -> nn.Module:
    """ResNet-20 for 32×32 pixels: 3 stages of 3 blocks, of the width that comes nearest to the weights of the base."""
    wanted = weights(parnet()(width, channels, classes))

    def of_width(w: int) -> nn.Module:
        stages = [Basic(a, b, s) for a, b, s in ((w, w, 1), (w, w, 1), (w, w, 1), (w, 2 * w, 2), (2 * w, 2 * w, 1),
                  (2 * w, 2 * w, 1), (2 * w, 4 * w, 2), (4 * w, 4 * w, 1), (4 * w, 4 * w, 1))]  # fmt: skip
        stem = [nn.Conv2d(channels, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU()]
        return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, classes))

    with torch.device("meta"):
        w = min(range(1, 4 * width), key=lambda w: abs(weights(of_width(w)) - wanted))
    model = of_width(w)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    return model


def weights(model: nn.Module) -> int:
    """Numbers in convolutions and classifier after folding: a 1×1 branch becomes part of its 3×3 convolution."""
    return sum(p.numel() for name, p in model.named_parameters() if p.ndim > 1 and ".rbr_1x1." not in name)


#: What a row is called, and its network.
ROWS: dict[str, Make] = {
    "base: RepVGG-SSE, SiLU, 3 streams": parnet(),
    "RepVGG block alone": parnet(gate="none"),
    "SE instead of SSE": parnet(gate="se"),
    "ReLU": parnet(activation="relu"),
    "1 stream": parnet(streams=1),
    "2 streams": parnet(streams=2),
    "4 streams": parnet(streams=4),
    "half the width": parnet(scale=0.5),
    "1.5 times the width": parnet(scale=1.5),
    "ResNet-20 of as many weights": resnet,
}


class Result(NamedTuple):
    row: str
    seed: int
    weights: int
    top1: float
    loss: float  # of validation
    seconds: float


def train(
    make: Make, s: Settings, data: Pictures, tell: Callable[[str], None]
) -> tuple[nn.Module, float, float, float]:
    """(the network, top-1, validation loss, seconds)."""
    channels = COLORS[s.color] if s.color != "auto" else 3
    torch.manual_seed(s.seed)
    network = make(s.width, channels, len(data.class_names))
    if s.threads:
        torch.set_num_threads(s.threads)
    p = Preprocessing.assumed(channels).replace(size=s.size, crop=s.crop)
    start = time.perf_counter()
    feed = Feed(Training(data.reader, data.train, s.seed, Augmentation(s, p), p.color), s.workers)
    learner = Learner(network, s, Ranks(0, 1, torch.device("cpu")))
    steps, done = len(data.train) // s.batch, 0
    for epoch in range(s.epochs + s.cooldown):
        batches = feed.read(training_parts(len(data.train), s.seed, epoch, 0, s.batch, 0, 1, s.accumulate))
        loss = 0.0
        for _ in range(steps):
            loss = learner.step(batches, done, s.rate(done, steps)).item()
            done += 1
        tell(f"epoch {epoch + 1}, loss {loss:.3f}")
    seconds = time.perf_counter() - start
    if any(isinstance(m, Constant | SqueezeExcitation) for m in network.modules()):
        network.deploy = None  # type: ignore[assignment]  # what is trained has no folded form
    validation = Feed(Validation(data.reader, data.validation, p), s.workers)
    scores = learner.scores(validation.read(validation_parts(len(data.validation), 100, 0, 1)))
    return network, scores.top1, scores.loss, seconds


def _read(path: Path) -> list[Result]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [tuple(row) for row in csv.reader(file)][1:]
    return [Result(r, int(s), int(p), float(t), float(x), float(z)) for r, s, p, t, x, z in rows]


def run(
    s: Settings, data: Pictures, rows: list[str], seeds: int, minutes: float, folder: Path, tell: Callable[[str], None]
) -> Iterator[Result]:
    """Trains what `folder`/runs.csv has not yet; gives all results.

    Raises:
        ValueError: that file is of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, note = folder / "runs.csv", folder / "settings.txt"
    made_by = f"{data.fingerprint()} {s.learned()}\n"
    if path.exists() and (not note.exists() or note.read_text(encoding="utf-8") != made_by):
        raise ValueError(f"{path} was made with other settings: name another folder")
    note.write_text(made_by, encoding="utf-8")
    before = _read(path)
    yield from before
    known = {(r.row, r.seed) for r in before}
    if not before:
        path.write_text(",".join(Result._fields) + "\n", encoding="utf-8")
    deadline = time.monotonic() + 60 * minutes
    for seed in range(seeds):
        for row in rows:
            if (row, seed) in known:
                continue
            if time.monotonic() > deadline:
                tell(f"{minutes:g} minutes are over")
                return
            tell(f"{row}, seed {seed}")
            chosen = dataclasses.replace(s, seed=seed)
            network, top1, loss, seconds = train(ROWS[row], chosen, data, tell)
            found = Result(row, seed, weights(network), top1, loss, seconds)
            with path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerow(found)
            yield found


def table(results: list[Result]) -> list[tuple[str, ...]]:
    """A line a row: weights, seeds, mean ± standard deviation of top-1, difference from the base's, seconds a run."""
    lines: list[tuple[str, ...]] = []
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.row, []).append(result)
    base: Any = {r.seed: r.top1 for r in groups.get(next(iter(ROWS)), [])}
    for row, found in groups.items():
        scores = [100 * r.top1 for r in found]
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        pairs = [100 * (r.top1 - base[r.seed]) for r in found if r.seed in base]
        against = f"{statistics.mean(pairs):+.2f}" if pairs and row != next(iter(ROWS)) else ""
        seconds = statistics.median(r.seconds for r in found)
        lines.append((row, f"{found[0].weights / 1e6:.3f}", str(len(found)),
                      f"{statistics.mean(scores):.2f}{spread}", against, f"{seconds:.0f}"))  # fmt: skip
    return lines


HEADER = ("network", "M weights", "seeds", "top-1, %", "against the base", "seconds a run")
