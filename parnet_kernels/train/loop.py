"""The run: epochs of steps, validation, checkpoints, logs."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch

from parnet_kernels.checkpoint import load_checkpoint
from parnet_kernels.distributed.cut import sizes
from parnet_kernels.files import write_whole
from parnet_kernels.model import ParNet
from parnet_kernels.preprocessing import COLORS, Preprocessing
from parnet_kernels.train import state
from parnet_kernels.train.augmentation import Augmentation
from parnet_kernels.train.batches import Batch, Feed, Training, Validation, training_parts, validation_parts
from parnet_kernels.train.learner import Learner, Scores
from parnet_kernels.train.logs import Logs
from parnet_kernels.train.ranks import Ranks
from parnet_kernels.train.settings import Settings, written
from parnet_kernels.train.sources import pictures

TOLD_PROBLEMS = 10  # pictures with problems that are named
VALIDATED = 256  # pictures at a time


class Stopped(ValueError):
    """Training cannot go on: the loss is no number any more, or a checkpoint cannot be written. The text says what
    there is to go on from.
    """


class Watcher(Protocol):
    """What shows how it goes."""

    def say(self, text: str) -> None: ...
    def step(self, done: int, total: int, epoch: int, loss: float, rate: float) -> None: ...
    def epoch(self, row: dict[str, float]) -> None: ...


class Run:
    """One run of training. All processes of it make one; the first writes the files.

    Raises:
        OSError: pictures or the folder cannot be read or written.
        ImportError: a package is missing.
        ValueError: settings and pictures do not fit each other, or the run in the folder.
    """

    def __init__(self, settings: Settings, ranks: Ranks, watcher: Watcher, resume: bool = False) -> None:
        self.settings, self.ranks, self._watcher = settings, ranks, watcher
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.folder = Path(settings.out)
        self._owned: state.Owned | None = None
        try:
            self._set_up(resume)
        except BaseException:
            self._release()
            raise

    def _set_up(self, resume: bool) -> None:
        s, r = self.settings, self.ranks
        self.data = pictures(s.data, s.val_fraction, s.limit, s.seed)
        self._fingerprint = self.data.fingerprint()
        point = self._point(resume)
        self.network, self.preprocessing = self._make(point)
        self._check()
        self._problems: Counter[str] = Counter()
        for text in self.data.warnings if r.first else []:
            self._watcher.say(text)
        p = self.preprocessing
        self._training = Feed(
            Training(self.data.reader, self.data.train, s.seed, Augmentation(s, p), p.color), s.workers
        )
        self._validation = Feed(Validation(self.data.reader, self.data.validation, p), s.workers)
        self.steps = len(self.data.train) // s.batch  # an epoch
        self.total = self.steps * (s.epochs + s.cooldown)
        self.done, self.best, self._sums = 0, -math.inf, [0.0, 0.0]
        self.learner = self._begin(point)
        self._logs = Logs(self.folder, self.done, s.tensorboard) if r.first else None

    def _release(self) -> None:
        if self._owned is not None:
            self._owned.release()

    def _point(self, resume: bool) -> state.Point | None:
        """Where the run in the folder stands, if it is to go on."""
        problem, s = "", self.settings
        if self.ranks.first:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._owned = state.Owned(self.folder)
                write_whole(self.folder / ".writable", b"")
                (self.folder / ".writable").unlink()
                for part in self.folder.glob(".*.part"):  # of a process that was killed
                    part.unlink()
                if state.exists(self.folder) and not resume:
                    problem = f"{self.folder} holds a run: --resume goes on with it; or name another folder (--out)"
            except OSError as error:
                problem = f"cannot write to the folder {self.folder}: {error}"
        self.ranks.wait(problem)
        point = state.read(self.folder, "last") if resume else None
        if point is not None:
            before, now = point.progress["settings"], s.learned()
            others = [f"{k} is {v!r}, was {before.get(k)!r}" for k, v in now.items() if before.get(k) != v]
            if others:
                raise ValueError(f"the run in {self.folder} has other settings: {'; '.join(others)}")
            if point.progress.get("pictures") != self._fingerprint:
                raise ValueError(f"the pictures in {s.data} are not those of the run in {self.folder}")
        elif self.ranks.first:
            write_whole(self.folder / "run.yaml", written(s).encode("utf-8", "backslashreplace"))
        return point

    def _make(self, point: state.Point | None) -> tuple[ParNet, Preprocessing]:
        s, names = self.settings, self.data.class_names
        torch.manual_seed(s.seed)
        if point is not None:
            network = point.network
        elif s.init:
            network = load_checkpoint(s.init, activation=None if s.activation == "auto" else s.activation)
            known = network.class_names
            if network.num_classes != len(names) or (known is not None and known != names):
                network.reset_classifier(len(names))
        else:
            network = ParNet(s.network(len(names)))
        said, channels = network.preprocessing, network.config.in_chans
        color = s.color if s.color != "auto" else said.color if said else "gray" if channels == 1 else "rgb"
        if COLORS[color] != channels:
            raise ValueError(f"`color` {color} makes {COLORS[color]} channels, the network takes {channels}")
        p = said if said is not None and said.color == color else Preprocessing.assumed(channels)
        p = p.replace(size=s.size, crop=s.crop, interpolation=s.interpolation, color=color)
        network.preprocessing, network.class_names = p, names
        return network, p

    def _check(self) -> None:
        s, world, count = self.settings, self.ranks.world, len(self.data.train)
        parts = world * s.accumulate
        if s.batch % parts:
            raise ValueError(f"`batch` must be a multiple of processes × accumulate, {parts}, got {s.batch}")
        if count < s.batch:
            raise ValueError(f"`batch` must be ≤ the training pictures, {count}, got {s.batch}")
        share = s.batch // parts * (world if s.sync_bn else 1)
        maps = sizes(self.network.config, (share, 3, s.size, s.size)).items()
        single = [name for name, (n, _, h, w) in maps if n * h * w < 2]
        if single:
            raise ValueError(
                f"`batch` {s.batch} gives each BatchNorm {share} picture at a time, whose map at {single[0]} is one "
                "pixel: no variance; take larger batches, fewer parts or larger pictures"
            )

    def _begin(self, point: state.Point | None) -> Learner:
        if point is None:
            return Learner(self.network, self.settings, self.ranks)
        progress, named = point.progress, point.tensors.items()
        self.done, self.best, self._sums = progress["step"], progress["best"], progress["sums"]
        weights, momentum = (
            {name.removeprefix(kind): t for name, t in named if name.startswith(kind)}
            for kind in ("weight.", "momentum.")
        )
        return Learner(self.network, self.settings, self.ranks, weights, momentum)

    def __call__(self) -> Scores | None:
        """Trains to the end. Returns the scores of the last validation; None if there was nothing left to do.

        Raises:
            Stopped: it cannot go on.
            OSError: pictures cannot be read, logs not written, or a process that reads was killed.
        """
        scores = None
        try:
            for epoch in range(self.done // self.steps, self.settings.epochs + self.settings.cooldown):
                start, first = time.perf_counter(), self.done % self.steps
                self._epoch(epoch, first)
                scores = self._end_of_epoch(epoch, start, first)
        except RuntimeError as error:  # PyTorch raises this one wherever the program is then
            if "DataLoader worker" not in str(error):
                raise
            raise OSError(f"a process that reads pictures was killed ({error}): is memory short?") from error
        finally:
            if self._logs is not None:
                self._logs.close()
            self._release()
            if len(self._problems) > TOLD_PROBLEMS:
                self._watcher.say(f"{len(self._problems)} pictures had problems")
        return scores

    def _read(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Tells of each picture with a problem once."""
        for batch in batches:
            for name, reason in batch.problems:
                if name not in self._problems and len(self._problems) < TOLD_PROBLEMS:
                    self._watcher.say(reason if name in reason else f"{name}: {reason}")
                self._problems[name] += 1
            yield batch

    def _epoch(self, epoch: int, first: int) -> None:
        s, r = self.settings, self.ranks
        if not first:
            self._sums = [0.0, 0.0]
        parts = training_parts(len(self.data.train), s.seed, epoch, first, s.batch, r.rank, r.world, s.accumulate)
        batches, since = self._read(self._training.read(parts)), time.perf_counter()
        recent, logged = torch.zeros((), dtype=torch.float64, device=r.device), self.done
        for _ in range(first, self.steps):
            rate = s.rate(self.done, self.steps)
            recent += self.learner.step(batches, self.done, rate)
            self.done += 1
            due = self.done % s.log_every == 0 or self.done % self.steps == 0
            save = bool(s.save_every) and self.done % s.save_every == 0 and self.done % self.steps != 0
            if due or save:
                seconds, count = time.perf_counter() - since, self.done - logged
                (total,) = r.sums(recent.item() / r.world)
                loss, since, logged = total / count, time.perf_counter(), self.done
                recent.zero_()
                if not math.isfinite(loss):
                    raise Stopped(self._diverged(f"the loss is {loss}", epoch))
                self._sums = [self._sums[0] + total, self._sums[1] + count]
                if self._logs is not None:
                    speed = count * s.batch / seconds
                    row = {"step": self.done, "epoch": epoch + 1, "lr": rate, "loss": loss, "images_per_second": speed}
                    self._log(self._logs.step, row)
                    self._watcher.step(self.done, self.total, epoch, loss, speed)
            if save:
                self._save(["last"], epoch)

    def _end_of_epoch(self, epoch: int, start: float, first: int) -> Scores:
        s, r = self.settings, self.ranks
        seconds = time.perf_counter() - start
        parts = validation_parts(len(self.data.validation), min(s.batch, VALIDATED), r.rank, r.world)
        scores = self.learner.scores(self._read(self._validation.read(parts)))
        better = not scores.pictures or scores.top1 > self.best
        if better and scores.pictures:
            self.best = scores.top1
        row = {
            "epoch": epoch + 1, "step": self.done, "lr": s.rate(self.done - 1, self.steps),
            "loss": self._sums[0] / self._sums[1], "val_loss": scores.loss, "top1": scores.top1, "top5": scores.top5,
            "images_per_second": (self.steps - first) * s.batch / seconds, "seconds": time.perf_counter() - start,
        }  # fmt: skip
        if self._logs is not None:  # before the checkpoint: rows after it are cut off when a run goes on, none is added
            self._log(self._logs.epoch, row)
        self._save(["best", "last"] if better else ["last"], epoch)
        if self._logs is not None:
            self._watcher.epoch(row)
        return scores

    def _log(self, write: Callable[..., None], row: dict[str, float]) -> None:
        try:
            write(**row)
        except OSError as error:
            raise Stopped(f"{error}; {self._good()}") from error

    def _save(self, names: list[str], epoch: int) -> None:
        """`last` comes last: where a run was cut before it, the steps that lead to the others are done again."""
        problem, shadow = "", self.learner.shadow
        self.learner.settle()
        if self.ranks.first:
            # Counters of BatchNorms are not what a file of weights is read for: loading starts them anew.
            trained = self.learner.model.state_dict().items()
            weights = {f"weight.{k}": t for k, t in trained if self.settings.ema or not t.is_floating_point()}
            tensors = weights | {f"momentum.{k}": t for k, t in self.learner.momentum().items()}
            progress = {
                "step": self.done, "best": self.best, "sums": self._sums,
                "settings": self.settings.learned(), "pictures": self._fingerprint,
            }  # fmt: skip
            try:
                if all(bool(t.isfinite().all()) for t in shadow.state_dict().values()):
                    for name in names:
                        state.write(self.folder, name, state.Point(shadow, tensors, progress))
                else:
                    problem = self._diverged("a weight is not finite", epoch)
            except OSError as error:
                problem = f"{error}; {self._good()}"
        try:
            self.ranks.wait(problem)
        except ValueError as error:
            raise Stopped(str(error)) from error

    def _good(self) -> str:
        path = self.folder / "last.safetensors"
        return f"the last good checkpoint is {path}" if path.exists() else "there is no checkpoint yet"

    def _diverged(self, what: str, epoch: int) -> str:
        return (
            f"{what} in epoch {epoch + 1}, before step {self.done}: stopped; {self._good()}. A lower --lr-base, or a "
            "longer --warmup, may help"
        )
