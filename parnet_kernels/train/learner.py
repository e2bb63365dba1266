"""One network that learns: the step of the optimizer, the average of weights, and the scores."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parnet_kernels import training_ops, training_sync
from parnet_kernels.selection import forced_backend
from parnet_kernels.train.batches import Batch, mixed
from parnet_kernels.train.ranks import Ranks
from parnet_kernels.train.settings import Settings


class Scores(NamedTuple):
    loss: float  # cross-entropy without smoothing
    top1: float
    top5: float
    pictures: int


class Learner:
    """Trains a copy of `network`, which becomes the average that is validated: `shadow`.

    weights, momentum: to go on from, by name.
    """

    def __init__(
        self,
        network: Any,
        settings: Settings,
        ranks: Ranks,
        weights: Mapping[str, Tensor] | None = None,
        momentum: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._settings, self._ranks, device = settings, ranks, ranks.device
        self.model = copy.deepcopy(network)
        if weights is not None:
            self.model.load_state_dict(weights, strict=False)
        self.model = self.model.to(device).train()
        self.shadow = network.to(device).eval().requires_grad_(False)
        if device.type == "cuda":
            self.model = self.model.to(memory_format=torch.channels_last)
        if settings.sync_bn and ranks.world > 1:
            training_sync.convert(self.model)
        self._names = {p: name for name, p in self.model.named_parameters()}
        decayed, others = ([p for p in self._names if (p.ndim > 1) == wide] for wide in (True, False))
        self.optimizer = torch.optim.SGD(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=1.0,
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
        )
        for p, name in self._names.items() if momentum else ():
            if momentum and name in momentum:
                self.optimizer.state[p]["momentum_buffer"] = momentum[name].to(p.device, copy=True)
        pairs = [*zip(self.shadow.state_dict().values(), self.model.state_dict().values(), strict=True)]
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._follow_counters()
        self._parallel: Any = self.model
        if ranks.world > 1:
            self._parallel = nn.parallel.DistributedDataParallel(self.model)

    def compile_kernels(self) -> int:
        """Where the network trains on Triton kernels: compiles those of a step side by side, and shows it; the first
        step would compile one after the other. All processes call it. Returns how many kernels were compiled.
        """
        s, device = self._settings, self._ranks.device
        missing = training_ops.reasons(torch.empty(1, 1, 1, 1, device=device))["triton"]
        if missing is not None or forced_backend() not in (None, "triton"):
            return 0
        from parnet_kernels.triton.tuning import compile_step

        share = s.batch // (self._ranks.world * s.accumulate)
        x = torch.zeros(share, self.model.config.in_chans, s.size, s.size, device=device)
        told = None if self._ranks.first else (lambda done, total: None)
        return compile_step(self.model, x, autocast=torch.bfloat16 if s.amp else None, told=told)

    def momentum(self) -> dict[str, Tensor]:
        """The buffers of SGD, by the names of their parameters."""
        found = {name: self.optimizer.state[p].get("momentum_buffer") for p, name in self._names.items()}
        return {name: buffer for name, buffer in found.items() if buffer is not None}

    @torch.no_grad()
    def _follow_counters(self) -> None:
        for own, trained in self._counters:
            own.copy_(trained)

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Moves the average by 1 − decay of the way to the weights."""
        torch._foreach_lerp_([own for own, _ in self._floats], [trained for _, trained in self._floats], 1 - decay)
        self._follow_counters()

    def step(self, batches: Iterator[Batch], done: int, rate: float) -> Tensor:
        """The step of the optimizer after `done` others. Returns the loss: the mean over this process's pictures."""
        s, device = self._settings, self._ranks.device
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for part in range(s.accumulate):
            x, y, *_ = next(batches)
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            torch.manual_seed(mixed(s.seed, done, part, self._ranks.rank))  # of dropout
            waits: AbstractContextManager[Any] = nullcontext()
            if self._ranks.world > 1 and part + 1 < s.accumulate:
                waits = self._parallel.no_sync()
            with waits:
                with torch.autocast(device.type, torch.bfloat16, enabled=s.amp):
                    logits = self._parallel(x)
                part_loss = F.cross_entropy(logits.float(), y, label_smoothing=s.label_smoothing) / s.accumulate
                part_loss.backward()
            loss += part_loss.detach()
        self.optimizer.step()
        if s.ema:
            self.follow(min(s.ema, (1 + done) / (10 + done)))  # early averages forget faster
        return loss

    def settle(self) -> None:
        """Before `shadow` is looked at: without an average it is the weights."""
        if not self._settings.ema:
            self.follow(0.0)

    @torch.inference_mode()
    def scores(self, batches: Iterator[Batch]) -> Scores:
        """Of `shadow`, over the batches of all processes. On a CPU of its folded form, where it has one: as it will be
        used.
        """
        self.settle()
        device = self._ranks.device
        fold = getattr(self.shadow, "deploy", None)
        network = fold() if fold is not None and device.type == "cpu" else self.shadow
        sums = [0.0, 0.0, 0.0, 0.0]
        for x, y, *_ in batches:
            if not len(y):
                continue
            logits, y = network(x.to(device)).float(), y.to(device)
            best = logits.topk(min(5, logits.shape[1]), 1).indices == y[:, None]
            sums[0] += F.cross_entropy(logits, y, reduction="sum").double().item()
            sums[1] += best[:, 0].sum().item()
            sums[2] += best.any(1).sum().item()
            sums[3] += len(y)
        loss, top1, top5, count = self._ranks.sums(*sums)
        n = count or math.nan
        return Scores(loss / n, top1 / n, top5 / n, int(count))
