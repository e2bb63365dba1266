"""The cost model of several devices, and `parnet plan`."""

from __future__ import annotations

import itertools
import json

import pytest
from typer.testing import CliRunner

from parnet_kernels.app.cli import app
from parnet_kernels.app.plan import compare
from parnet_kernels.config import VARIANTS, ParNetConfig, layers
from parnet_kernels.distributed.cost import Device, Link, Model, Placement, sent_bytes
from parnet_kernels.distributed.cut import cut
from parnet_kernels.distributed.machines import DEVICES, LINKS

DEVICE, LINK = Device(1e12, 1e11, 1e-6, 100), Link(1e-5, 1e10)
CONFIGS = {
    **VARIANTS,
    "one stream": ParNetConfig((8, 16), (3,)),
    "two streams": ParNetConfig((8, 12, 16), (3, 2)),
    "five streams": ParNetConfig((8, 12, 16, 16, 16, 20), (3, 2, 1, 2, 2)),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_cut_has_every_layer_once_and_pieces_read_what_is_made(config: ParNetConfig) -> None:
    pieces = cut(config)
    assert sorted(layer.name for layer in pieces.every()) == sorted(layer.name for layer in layers(config))
    for s, (source, end) in enumerate(zip(pieces.sources, pieces.ends, strict=True)):
        made = {"image", *(layer.name for layer in pieces.trunk_between(0, s))}
        assert source in made
        made = {source}
        for layer in pieces.streams[s]:
            assert {*layer.inputs} <= made
            made.add(layer.name)
        assert end in made
    made = {*pieces.ends}
    for layer in pieces.fusion:
        assert {*layer.inputs} <= made
        made.add(layer.name)


def test_the_time_of_a_layer_by_hand() -> None:
    model = Model(ParNetConfig((64, 64, 64, 64), (2, 2, 2), num_classes=0), (1, 3, 256, 256))
    layer = next(layer for layer in model.cut.every() if layer.name == "streams.0.0")
    flops, tiles = 2 * 64 * 64 * 64 * 64 * 9, 64  # 64×64 pixels, 64 → 64 channels
    values = 64 * 64 * 9 + 2 * 64 * 64 * 64
    busy = max(flops / 1e12, values * 4 / 1e11)
    assert model.layers_time([layer], DEVICE) == pytest.approx(1e-6 + busy)
    few = Device(1e12, 1e15, 1e-6, 1024)  # a quarter of the units has a tile, split in four
    assert model.layers_time([layer], few) == pytest.approx(1e-6 + flops / 1e12 / min(1, tiles * 4 / 1024))
    eager = Device(1e12, 1e11, 1e-3, eager=True)
    assert model.layers_time([layer, layer], eager) == pytest.approx(18e-3)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_best_placement_is_the_fastest_of_all(config: ParNetConfig) -> None:
    model = Model(config, (2, 3, 128, 96))
    for ranks in range(1, min(config.streams, 3) + 1):
        placements = [*model.placements(ranks)]
        for p in placements:
            assert sorted(itertools.chain(*p.streams)) == [*range(config.streams)]
            assert p.starts[0] is None
            assert all(start is None or start <= min(own) for own, start in zip(p.streams, p.starts, strict=True))
        best = model.best(ranks, DEVICE, LINK)
        fastest = min(model.time(p, DEVICE, LINK) for p in placements)
        assert model.time(best, DEVICE, LINK) == pytest.approx(fastest, rel=1e-8)
        assert best == model.best(ranks, DEVICE, LINK)
    alone = Placement((tuple(range(config.streams)),), (None,))
    assert model.best(1, DEVICE, LINK) == alone
    assert model.time(alone, DEVICE, LINK) >= model.single_time(DEVICE) - 1e-12  # streams and fusion share no level


def test_what_the_link_decides() -> None:
    model = Model(VARIANTS["m"], (8, 3, 224, 224))
    single = model.single_time(DEVICE)
    slow, fast = Link(10.0, 1e3), Link(0.0, 1e15)
    assert model.time(model.best(3, DEVICE, slow), DEVICE, slow) > single
    assert model.time(model.best(3, DEVICE, fast), DEVICE, fast) < 0.6 * single
    # A rank that has the images gains nothing by another's maps. Else the last stream's, which is smaller, is sent.
    assert set(model.best(3, DEVICE, slow).starts) == set(model.best(3, DEVICE, fast).starts) == {None}
    sent = model.best(3, DEVICE, Link(0.0, 1e8), image_sent=True)
    assert model.bytes_of(model.cut.sources[2]) < model.bytes_of("image") < model.bytes_of(model.cut.sources[1])
    assert 2 in sent.starts
    assert 1 not in sent.starts
    for trunk, allowed in (("recompute", lambda start: start is None), ("send", lambda start: start is not None)):
        assert all(allowed(start) for start in model.best(3, DEVICE, fast, trunk=trunk).starts[1:])
    prescribed = model.best(3, DEVICE, fast, streams=[[1], [2], [0]])
    assert prescribed.streams == ((1,), (2,), (0,))
    assert prescribed.describe().startswith("rank 0: stream 1, from the image, fusion; rank 1: stream 2, from ")


def test_bytes_that_are_sent() -> None:
    model = Model(VARIANTS["s"], (1, 3, 224, 224))
    placement = Placement(((0,), (1,), (2,)), (None, None, 1))
    assert sent_bytes(model, placement, image_sent=True) == {
        (0, 1): 4 * 3 * (224 * 224 + 1),
        (1, 0): 4 * 192 * (28 * 28 + 1),
        (0, 2): 4 * 192 * (28 * 28 + 1),
        (2, 0): 4 * 384 * (14 * 14 + 1),
    }
    assert sent_bytes(model, placement)[0, 1] == 0


def test_the_finding_of_the_paper_comes_out_of_the_model() -> None:
    """Three RTX 3090 are faster than one at batch 1, in eager PyTorch; and would be with fused levels."""
    for name in VARIANTS:
        for device in ("rtx3090-eager", "rtx3090"):
            times = compare(VARIANTS[name], 224, 1, DEVICES[device], 3, LINKS["nccl-pcie4"])
            assert times["streams"] < 0.75 * times["one device"]
            assert times["data parallel"] == times["one device"]
            many = compare(VARIANTS[name], 224, 32, DEVICES[device], 3, LINKS["nccl-pcie4"])
            assert many["data parallel"] < many["streams"]


def test_the_command() -> None:
    done = CliRunner().invoke(app, ["plan", "--devices", "l4:2", "--link", "pcie4", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["modelled"].startswith("modelled, in ms: 2 × L4")
    assert len(found["results"]) == 4 * 4 * 6
    groups = itertools.groupby(found["results"], key=lambda entry: (entry["variant"], entry["size"]))
    for _, group in groups:
        assert sum(entry["break-even"] for entry in group) <= 1
    text = CliRunner().invoke(app, ["plan", "--variant", "s", "--size", "224", "--link", "12.5,3"]).output
    assert text.splitlines()[0].endswith("link: 12.5 µs, 3 GB/s")
    assert "modelled" in text
    assert text.count("break-even") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "a100"], "NAME:COUNT"),
        (["--devices", "a100:1"], "COUNT 2 to 8"),
        (["--devices", "v100:2"], "'v100:2'"),
        (["--link", "wire"], "'wire'"),
        (["--link", "1,-2"], "'1,-2'"),
        (["--link", "nan,1"], "'nan,1'"),
        (["--variant", "xxl"], "'xxl'"),
        (["--size", "0"], "size"),
        (["--batch", "x"], "batch"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["plan", *arguments])
    assert done.exit_code == 2
    assert message in done.output
