"""The end of a run: the deployed network, and whether it says what the trained one says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from parnet_kernels.checkpoint import load_checkpoint, save
from parnet_kernels.train.batches import Validation, validation_parts
from parnet_kernels.train.sources import Pictures

LOGIT_TOLERANCE = 1e-3  # of the largest difference of logits between the two forms, relative to the largest logit or 1
PICTURES = 2048  # compared at most, of all classes


class Comparison(NamedTuple):
    pictures: int
    agree: int  # same answer, or one that a tie within the tolerance lets open
    difference: float  # as LOGIT_TOLERANCE
    right: int  # of the deployed network

    @property
    def passed(self) -> bool:
        return self.agree == self.pictures and self.difference <= LOGIT_TOLERANCE


@torch.inference_mode()
def deploy(folder: Path, data: Pictures) -> Comparison:
    """Writes `folder`/deployed.safetensors from the best checkpoint, and compares both forms on pictures of the
    validation part (of the training part, if there is none).

    Raises:
        OSError: the file cannot be written.
    """
    trained = load_checkpoint(folder / "best.safetensors")
    deployed = trained.deploy()
    save(deployed, folder / "deployed.safetensors")
    assert trained.preprocessing is not None
    samples = data.validation or data.train
    samples = samples[:: -(-len(samples) // PICTURES)]  # they stand by class
    batches = Validation(data.reader, samples, trained.preprocessing)
    pictures = agree = right = 0
    difference = 0.0
    parts: Iterator[tuple[int, list[int]]] = validation_parts(len(samples), 64, 0, 1)
    for part in parts:
        x, y, *_ = batches[part]
        if not len(y):
            continue
        expected, found = trained(x), deployed(x)
        scale = max(1.0, expected.abs().max().item())
        difference = max(difference, (expected - found).abs().max().item() / scale)
        answers = expected.argmax(1), found.argmax(1)
        gap = expected.gather(1, answers[0][:, None]) - expected.gather(1, answers[1][:, None])
        agree += int((gap[:, 0] <= LOGIT_TOLERANCE * scale).sum())
        right += int((answers[1] == y).sum())
        pictures += len(y)
    return Comparison(pictures, agree, difference, right)
