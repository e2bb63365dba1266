"""`parnet demo`: train, deploy, compare and time a ParNet on real images, from nothing; checks itself.

Trains a small CIFAR-form ParNet on the 1,797 handwritten digits that scikit-learn ships, deploys it, requires the same
prediction from both forms on every test image, and times ParNet-S undeployed and deployed.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from parnet_kernels.app.console import shown
from parnet_kernels.deployed import DeployedParNet
from parnet_kernels.model import ParNet, parnet_cifar, parnet_s
from parnet_kernels.preprocessing import Preprocessing

ACCURACY = 0.97  # the demo fails below
EPOCHS = 6
BATCH = 32
LOGIT_TOLERANCE = 1e-3  # of the largest logit difference between the two forms, float32


@dataclass
class Digits:
    """Images [N, 1, 32, 32] in 0…1 and labels [N]; one image in four is for testing, in a fixed split."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_digits() -> Digits:
    from sklearn.datasets import load_digits as load

    raw = load()
    x = torch.from_numpy(raw.images.astype(np.float32))[:, None] / 16
    x = F.interpolate(x, (32, 32), mode="bilinear", align_corners=False)
    y = torch.from_numpy(raw.target.astype(np.int64))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(y) // 4], order[len(y) // 4 :]
    return Digits(x[train], y[train], x[test], y[test])


def shifted(x: Tensor, generator: torch.Generator, reach: int = 3) -> Tensor:
    """The batch moved by up to `reach` pixels in each direction."""
    dy, dx = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
    return F.pad(x, (reach,) * 4)[:, :, reach + dy : reach + dy + x.shape[2], reach + dx : reach + dx + x.shape[3]]


def train(data: Digits, console: Console, epochs: int = EPOCHS) -> ParNet:
    """SGD with Nesterov momentum on a one-cycle schedule; deterministic for a number of threads."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = parnet_cifar(width=16, in_chans=1)
    steps = epochs * (len(data.train_x) // BATCH)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0}],
        lr=0.1,
        momentum=0.9,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=steps)
        for _ in range(epochs):
            order = torch.randperm(len(data.train_x), generator=generator)
            for batch in order.split(BATCH)[: len(order) // BATCH]:
                x = shifted(data.train_x[batch], generator)
                loss = F.cross_entropy(model(x), data.train_y[batch], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update(task, advance=1, description=f"loss {loss.item():.3f}")
    return model.eval()


@torch.inference_mode()
def median_ms(model: nn.Module, x: Tensor, repetitions: int) -> float:
    for _ in range(2):
        model(x)
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        model(x)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def draw(path: Path, data: Digits, predicted: Tensor, latency: dict[str, float]) -> None:
    """Test images with predictions, the confusion matrix and the latency of ParNet-S."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(14, 4.6), layout="constrained")
    panels: Any = figure.subfigures(1, 3, width_ratios=(1.2, 1, 0.9))
    left, middle, right = panels
    wrong = (predicted != data.test_y).nonzero().flatten()
    shown = torch.cat((wrong, torch.arange(len(data.test_y))))[:24]
    for axis, i in zip(left.subplots(4, 6).flat, shown.tolist(), strict=True):
        right_answer = predicted[i] == data.test_y[i]
        axis.imshow(data.test_x[i, 0], cmap="gray_r")
        axis.set_title(
            f"{predicted[i]}" if right_answer else f"{predicted[i]}, is {data.test_y[i]}",
            color="black" if right_answer else "crimson",
            fontsize=9,
        )
        axis.axis("off")
    left.suptitle(f"predictions, all {len(wrong)} errors first")
    matrix = torch.zeros(10, 10, dtype=torch.int64)
    matrix.index_put_((data.test_y, predicted), torch.ones_like(predicted), accumulate=True)
    axis = middle.subplots()
    axis.imshow(matrix, cmap="Blues")
    for row in range(10):
        for column in range(10):
            if count := int(matrix[row, column]):
                axis.text(
                    column, row, str(count), ha="center", va="center", color="white" if row == column else "black"
                )
    axis.set(xticks=range(10), yticks=range(10), xlabel="predicted", ylabel="digit", title="test images")
    axis = right.subplots()
    bars = axis.bar(list(latency), list(latency.values()), color=["tab:gray", "tab:green"])
    axis.bar_label(bars, fmt="%.1f ms")
    axis.set(ylabel="ms", title=f"ParNet-S, 224×224, batch 1,\n{torch.get_num_threads()} threads, median")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(out: Path, console: Console, epochs: int = EPOCHS) -> bool:
    """The whole demo; writes `out`/demo.png and `out`/digits.safetensors. Returns whether every check passed."""
    from parnet_kernels.checkpoint import save

    data = load_digits()
    start = time.perf_counter()
    model = train(data, console, epochs)
    seconds = time.perf_counter() - start
    model.preprocessing = Preprocessing(32, 1.0, mean=(0.0,), std=(1.0,), color="gray")
    model.class_names = tuple("0123456789")
    deployed: DeployedParNet = model.deploy()
    with torch.inference_mode():
        trained_logits, deployed_logits = model(data.test_x), deployed(data.test_x)
    predicted = deployed_logits.argmax(1)
    accuracy = (predicted == data.test_y).double().mean().item()
    agree = int((predicted == trained_logits.argmax(1)).sum())
    difference = (trained_logits - deployed_logits).abs().max().item()

    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    large = parnet_s().eval()
    latency = {"undeployed": median_ms(large, image, 7), "deployed": median_ms(large.deploy(), image, 15)}

    out.mkdir(parents=True, exist_ok=True)
    draw(out / "demo.png", data, predicted, latency)
    save(deployed, out / "digits.safetensors")
    checks = {
        f"test accuracy ≥ {ACCURACY:.0%}": (accuracy >= ACCURACY, f"{accuracy:.2%} of {len(data.test_y)} images"),
        "trained and deployed agree on every test image": (agree == len(data.test_y), f"{agree} of {len(data.test_y)}"),
        f"largest logit difference ≤ {LOGIT_TOLERANCE:g}": (difference <= LOGIT_TOLERANCE, f"{difference:.2g}"),
    }
    table = Table("", "", "", title="ParNet demo", show_header=False)
    table.add_row("training", f"{seconds:.0f} s, {len(data.train_x)} images, {epochs} epochs", "")
    for what, (passed, found) in checks.items():
        table.add_row(what, found, "[green]passed" if passed else "[red]FAILED")
    table.add_row("ParNet-S, 224×224, undeployed", f"{latency['undeployed']:.1f} ms", "")
    table.add_row(
        "ParNet-S, 224×224, deployed",
        f"{latency['deployed']:.1f} ms",
        f"{latency['undeployed'] / latency['deployed']:.1f}×",
    )
    table.add_row("picture, network", Text(shown(f"{out / 'demo.png'}, {out / 'digits.safetensors'}")), "")
    console.print(table)
    return all(passed for passed, _ in checks.values())
