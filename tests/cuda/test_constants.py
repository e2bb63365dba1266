"""The planner's constants: one table, what a measurement puts in its place, and the fit."""

from __future__ import annotations

import json

import pytest

from bench import cuda_constants
from parnet_kernels.cuda import constants as table
from parnet_kernels.cuda import plan
from parnet_kernels.cuda.constants import Constants
from parnet_kernels.cuda.plan import A100, H100, Shape, plan_level

SHAPES = [
    Shape(1, 56, 56, 1, 1, 2, 4),
    Shape(1, 28, 28, 1, 1, 4, 8),
    Shape(1, 14, 14, 1, 1, 8, 16),
    Shape(1, 28, 28, 2, 2, 4, 8),
]


@pytest.fixture
def measured(monkeypatch, tmp_path):
    monkeypatch.setattr(table, "MEASURED", tmp_path / "measured.json")
    for cached in (table.constants, plan_level):
        cached.cache_clear()
    yield tmp_path / "measured.json"
    for cached in (table.constants, plan_level):
        cached.cache_clear()


def test_modelled_without_a_measurement(measured):
    assert table.constants(80) == table.MODELLED[80]
    assert table.constants(103) == table.MODELLED[90]  # no model of its own


def test_a_measurement_replaces_what_it_has(measured):
    before = plan_level((SHAPES[2],), A100, "f16")
    table.write_measured(80, {"constants": {"split_cost": 100000.0}, "source": "a test"})
    table.write_measured(90, {"constants": {"trip": 7.0}})
    assert table.constants(80) == table.MODELLED[80]._replace(split_cost=100000.0)
    assert table.constants(90) == table.MODELLED[90]._replace(trip=7.0)
    assert table.constants(89) == table.MODELLED[89]
    plan_level.cache_clear()
    after = plan_level((SHAPES[2],), A100, "f16")
    assert before[0].splits > 1 == after[0].splits  # the planner goes by it
    assert json.loads(measured.read_text())["80"]["source"] == "a test"


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"80": {}}', '{"80": {"constants": {"trip": "x"}}}', '{"80": {"constants": {"trip": -1}}}',
     '{"80": {"constants": {"trip": NaN}}}'],
)  # fmt: skip
def test_a_damaged_file(measured, text):
    measured.write_text(text)
    with pytest.warns(UserWarning, match="modelled constants, since"):
        assert table.constants(80) == table.MODELLED[80]


def rows_of(gpu, c, start, unit):
    """Times as they would be if the model with constants c were the truth."""
    options = [(s, o) for s in SHAPES for o in cuda_constants.tilings(s, gpu, "f16")]
    rows = [cuda_constants.Timed(s, o, 0.0) for s, o in options]
    times = cuda_constants.units(rows, gpu, c)
    return [r._replace(microseconds=start + unit * u) for r, u in zip(rows, times, strict=True)]


@pytest.mark.parametrize("gpu", [A100, H100], ids=["A100", "H100"])
def test_the_fit_finds_times_of_other_constants(gpu):
    modelled = table.MODELLED[gpu.architecture]
    truth = modelled._replace(trip=120.0, split_cost=90.0, l2_reached=0.4, stage_cost=35.0)
    rows = rows_of(gpu, truth, 2.5, 0.004)
    assert len(rows) > 15
    assert cuda_constants.error(rows, gpu, truth) < 1e-9
    start, unit = cuda_constants.line(cuda_constants.units(rows, gpu, truth), [r.microseconds for r in rows])
    assert (start, unit) == pytest.approx((2.5, 0.004))
    before = cuda_constants.error(rows, gpu, modelled)
    found = cuda_constants.fit(rows, gpu, modelled)
    assert before > 0.05
    assert cuda_constants.error(rows, gpu, found) < before / 4
    entry = cuda_constants.entry(rows, gpu, found, "a GPU")
    assert entry["mean error after"] < entry["mean error before"]
    assert Constants(**entry["constants"]) == found
    assert plan.constants is table.constants  # the fit leaves the planner as it was


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(cuda_constants.torch.cuda, "is_available", lambda: False)
    assert cuda_constants.main([]) == 1
    assert capsys.readouterr().err == "cuda_constants: needs a CUDA device\n"
