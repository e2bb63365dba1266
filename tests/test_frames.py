"""Frames on a device: operators of that device alone, run here on tensors of the CPU, on meta and on fake tensors of
another device, against what files of the same pictures give.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parnet_kernels import Classifier, ParNet, ParNetConfig, Preprocessing
from parnet_kernels.app.frames import FILTERS, grey, prepared
from parnet_kernels.app.images import fitted, normalised

CONFIG = ParNetConfig((4, 6, 8, 8), (2, 2, 2), num_classes=3)
WIDE = Preprocessing((36, 48), 0.9)
SAYINGS = {
    "rgb": WIDE,
    "bgr": WIDE.replace(color="bgr"),
    "gray": WIDE.replace(color="gray", mean=(0.1,), std=(0.3,)),
    "bicubic": WIDE.replace(interpolation="bicubic"),
}


class OnDevice(Tensor):
    """A tensor of the CPU that says it is elsewhere: it takes the way of a GPU's."""

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False


def on_device(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.copy()).as_subclass(OnDevice)  # type: ignore[arg-type]


def network(said: Preprocessing = WIDE) -> ParNet:
    torch.manual_seed(0)
    model = ParNet(CONFIG.replace(in_chans=said.channels)).eval()
    model.preprocessing = said
    return model


def frame(height: int = 60, width: int = 100, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def levels(x: Tensor, p: Preprocessing) -> Tensor:
    """Of an input [N, C, height, width]: what it was before it was normalised, in 0…255."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (p.mean, p.std))
    return (x.as_subclass(Tensor).double() * std + mean) * 255


def same(found: Tensor, expected: Tensor, p: Preprocessing) -> bool:
    """The same levels but for the rounding of sums: few differ by one, hardly any by two."""
    differences = (levels(found, p) - levels(expected, p)).abs()
    assert found.shape == expected.shape
    return bool(differences.max() < 2.01 and (differences > 0.5).double().mean() < 0.1
                and (differences > 1.01).double().mean() < 1e-3)  # fmt: skip


# ------------------------------------------------------------------ the function


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(
    ("shape", "target"),
    [((96, 128), (36, 48)), ((100, 61), (36, 48)), ((20, 31), (60, 90)), ((30, 400), (40, 40)), ((1, 1), (8, 9))],
    ids=["down", "down, cut below", "up", "long", "one pixel"],
)
def test_levels_are_those_of_the_host(name: str, shape: tuple[int, int], target: tuple[int, int]) -> None:
    p = Preprocessing(target, 0.9, name)
    black_and_white = np.where(frame(*shape) < 128, 0, 255).astype(np.uint8)
    y, x = np.mgrid[: shape[0], : shape[1]]
    smooth = np.repeat((127 + 127 * np.sin(x / 9 + y / 7)).astype(np.uint8)[..., None], 3, 2)
    for pixels in map(torch.from_numpy, (frame(*shape), black_and_white, smooth)):
        found = prepared(pixels[None], p, "x")
        assert found.dtype == torch.float32
        assert found.is_contiguous()
        assert same(found, normalised([fitted(pixels, p, "x")], p), p)


def test_without_resizing_the_bits_are_those_of_the_host() -> None:
    """Whatever the filter is called: cutting and normalising alone."""
    for shape, target, crop in (((36, 48), (36, 48), 1.0), ((36, 70), (36, 48), 1.0), ((40, 40), (32, 32), 0.8)):
        for name in ("bilinear", "lanczos"):
            p = Preprocessing(target, crop, name)
            pixels = torch.from_numpy(np.stack([frame(*shape), frame(*shape, seed=1)]))
            assert torch.equal(prepared(pixels, p, "x"), normalised([fitted(x, p, "x") for x in pixels], p))


def test_frames_of_a_batch_do_not_mix() -> None:
    pixels = torch.from_numpy(np.stack([frame(seed=i) for i in range(3)]))
    for p in (WIDE, WIDE.replace(interpolation="bicubic", size=90)):
        together = prepared(pixels, p, "x")
        assert torch.equal(together, torch.cat([prepared(x[None], p, "x") for x in pixels]))
        assert torch.equal(prepared(pixels.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0), p, "x"), together)
        assert prepared(pixels[:0], p, "x").shape == (0, 3, p.height, p.width)


def test_grey_has_the_bits_of_pillow() -> None:
    ends = np.stack(np.meshgrid(*[np.array([0, 1, 127, 128, 254, 255], np.uint8)] * 3), -1).reshape(1, -1, 3)
    for pixels in (ends, frame(300, 400)):
        expected = np.asarray(Image.fromarray(pixels).convert("L"))
        assert np.array_equal(grey(torch.from_numpy(pixels))[..., 0], expected)


def test_filters_that_pytorch_does_not_have() -> None:
    for name in ("nearest", "box", "hamming", "lanczos"):
        message = f"picture 4 is on cpu, where `interpolation` must be one of bilinear, bicubic, got {name}"
        with pytest.raises(ValueError, match=message):
            prepared(torch.from_numpy(frame())[None], WIDE.replace(interpolation=name), "picture 4")


# ------------------------------------------------------------------ where it runs


class Devices(TorchDispatchMode):
    """Notes operators, where they work, and between which devices."""

    def __init__(self) -> None:
        super().__init__()
        self.moves: list[tuple[str, str, torch.dtype]] = []
        self.at: set[str] = set()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        made = func(*args, **(kwargs or {}))
        inputs = {str(x.device) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        outputs = {str(x.device) for x in tree_leaves(made) if isinstance(x, Tensor)}
        self.at |= inputs | outputs
        if inputs and outputs and inputs != outputs:
            self.moves.append((min(inputs), min(outputs), made.dtype))
        return made


@pytest.fixture
def seen() -> Iterator[Devices]:
    with FakeTensorMode(allow_non_fake_inputs=True), Devices() as seen:
        yield seen


# "lazy" is the device that every build of PyTorch knows well enough for fake tensors; nothing runs on it.
def fake(*shape: int, device: str = "lazy:1") -> Tensor:
    return torch.empty(shape, dtype=torch.uint8, device=device)


def classifier_on(device: str, said: Preprocessing = WIDE, frame_color: str = "rgb") -> Classifier:
    """Its network is only asked where it is: fake tensors have no weights to run."""
    with torch.utils._python_dispatch._disable_current_modes():
        classifier = Classifier(network(said), frame_color=frame_color)
    head = torch.empty(3, 8, dtype=torch.float16, device=device)
    classifier.network = SimpleNamespace(head_weight=head)  # type: ignore[assignment]
    return classifier


@pytest.mark.parametrize("color", ["rgb", "bgr"])
@pytest.mark.parametrize("said", SAYINGS.values(), ids=SAYINGS)
def test_nothing_leaves_the_device(said: Preprocessing, color: str, seen: Devices) -> None:
    made = classifier_on("lazy:1", said, color)
    for pictures, count in (
        (fake(60, 100, 3), 1),
        (fake(60, 100, 4), 1),
        (fake(60, 100), 1),
        (fake(60, 100, 1), 1),
        (fake(5, 60, 100, 3), 5),
        (fake(0, 60, 100, 3), 0),
        ([fake(60, 100, 3), fake(36, 48, 3), fake(20, 30)], 3),
    ):
        seen.at.clear()
        x = made.inputs(pictures)
        assert (x.shape, x.dtype, str(x.device)) == ((count, said.channels, 36, 48), torch.float16, "lazy:1")
        assert seen.at == {"lazy:1"}
    assert seen.moves == []
    assert "aten::flip" in seen.names or said.color == "gray" or said.color == color
    # What waits for the device, and what makes a tensor of numbers of the host.
    assert not seen.names & {"aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh", "aten::scalar_tensor"}


def test_frames_of_another_device_are_moved_as_pixels(seen: Devices) -> None:
    for device in ("lazy:1", "cpu"):
        made = classifier_on(device)
        for pictures, moves in ((fake(60, 100, 3, device="lazy:0"), 1), (fake(2, 60, 100, 3, device="lazy:0"), 1),
                                ([fake(60, 100, 3, device="lazy:0")] * 2, 2)):  # fmt: skip
            seen.moves.clear()
            assert str(made.inputs(pictures).device) == device
            assert seen.moves == [("lazy:0", device, torch.uint8)] * moves


def test_meta() -> None:
    for name in FILTERS:
        x = prepared(
            torch.empty(2, 480, 640, 3, dtype=torch.uint8, device="meta"), WIDE.replace(interpolation=name), "x"
        )
        assert (x.shape, x.device.type) == ((2, 3, 36, 48), "meta")


# ------------------------------------------------------------------ Classifier


@pytest.mark.parametrize("color", ["rgb", "bgr"])
@pytest.mark.parametrize("said", SAYINGS.values(), ids=SAYINGS)
def test_every_kind_of_frame(said: Preprocessing, color: str) -> None:
    classifier = Classifier(network(said), frame_color=color)
    pixels = frame()
    padded = np.zeros((70, 120, 4), dtype=np.uint8)
    padded[5:65, 6:106, :3] = pixels
    single = pixels[:, :, 1]
    for kind, host, device in (
        ("frame", pixels, on_device(pixels)),
        ("sliced, four channels", pixels, on_device(padded)[5:65, 6:106]),
        ("channels first in memory", pixels, on_device(pixels.transpose(2, 0, 1)).permute(1, 2, 0)),
        ("one channel", single, on_device(single)),
        ("one channel, said", single, on_device(single)[:, :, None]),
        ("many", np.stack([pixels, pixels[::-1]]), on_device(np.stack([pixels, pixels[::-1]]))),
        ("a list", [pixels, single], [on_device(pixels), on_device(single)]),
    ):
        first = device[0] if isinstance(device, list) else device
        before = first.clone()
        found = classifier.inputs(device)
        assert isinstance(found, OnDevice), kind  # the way of a device was taken
        assert same(found, classifier.inputs(host), said), kind
        assert torch.equal(first, before), kind


def test_mixed_lists_keep_their_order(tmp_path: Path) -> None:
    classifier = Classifier(network())
    pictures = [frame(50 + i, 70, seed=i) for i in range(4)]
    Image.fromarray(pictures[2]).save(tmp_path / "2.png")
    mixed = [on_device(pictures[0]), pictures[1], tmp_path / "2.png", on_device(pictures[3])]
    found, host = classifier.inputs(mixed).as_subclass(Tensor), classifier.inputs(pictures)
    assert torch.equal(found[1:3], host[1:3])
    assert same(found, host, WIDE)
    assert [row[0].label for row in classifier(mixed)] == [row[0].label for row in classifier(pictures)]
    assert classifier.features(mixed).shape == (4, 8)
    half = Classifier(network().deploy().bfloat16())
    assert half.inputs(mixed).dtype == half.inputs(mixed[0]).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (on_device(frame()).float(), r"picture 0 must be uint8 \[H, W, 3\], got float32 \[60, 100, 3\]$"),
        (on_device(frame()).permute(2, 0, 1), r"got uint8 \[3, 60, 100\]: it looks channels-first"),
        (on_device(frame())[None].permute(0, 3, 1, 2), r"got uint8 \[3, 60, 100\]: it looks channels-first"),
        (on_device(frame())[None, None], r"got uint8 \[1, 1, 60, 100, 3\]"),
        ([frame(), on_device(frame())[None]], r"picture 1 must be uint8 \[H, W, 3\], got uint8 \[1, 60, 100, 3\]"),
        (on_device(frame())[:0], "picture 0 has no pixels: 100×0"),
        ([frame(), on_device(frame())[:, :0]], "picture 1 has no pixels: 0×60"),
        (on_device(np.zeros((1, 200_000, 3), np.uint8)), "picture 0 is too elongated: its 200000×1 pixels become"),
        (torch.empty(60, 100, 3, dtype=torch.uint8, device="meta"), "picture 0 must have pixels, a tensor on meta"),
        ([frame(), torch.empty(60, 100, 3, dtype=torch.uint8, device="meta")], "picture 1 must have pixels"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_no_frame(picture: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Classifier(network()).inputs(picture)


def test_a_filter_that_the_device_does_not_have() -> None:
    classifier = Classifier(network(WIDE.replace(interpolation="lanczos")))
    with pytest.raises(ValueError, match="picture 1 is on cpu, where `interpolation` must be one of"):
        classifier.inputs([frame(), on_device(frame())])
    assert classifier.inputs([frame(), frame()]).shape == (2, 3, 36, 48)
