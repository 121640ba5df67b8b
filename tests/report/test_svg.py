"""Curves of a page: every value is there, panels stack on a phone."""

import dataclasses
import re

import numpy as np
import pytest

from tests.report.synthetic_runs import make_run
from uoe_jax.report.build import write_report
from uoe_jax.report.read import read_runs
from uoe_jax.report.svg import _ticks, health, learning


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return read_runs([make_run(root / p, p, seed=1) for p in ("tiny", "tiny-union")])


def test_validations_can_be_read_under_the_pointer(runs):
    drawn = learning(runs, "loss")
    assert drawn.count("<svg") == 3
    for run in runs:
        for step, loss in run.series("loss", "step", "eval").T:
            assert f"{run.name}, validation: {loss:.4g} at" in drawn, step
    assert health(runs).count("<svg") == 3


def test_points_lie_inside_their_panel(runs):
    for drawn in (
        learning(runs, "loss"),
        learning(runs, "bits_per_byte"),
        health(runs),
    ):
        places = re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', drawn)
        x, y = np.array(places, float).T
        assert len(places) > 10 and x.min() >= 0 and x.max() <= 370
        assert y.min() >= 0 and y.max() <= 270


def test_panels_stack_on_a_phone_and_need_no_script(runs):
    text = write_report([run.path for run in runs]).read_text()
    text, _, script = text.partition("<script")
    assert text.count("<svg") >= 9 and "svg" not in script  # it sorts tables
    narrow = text.split("@media (max-width: 700px)")[1]
    assert "grid-template-columns: 1fr" in narrow


@pytest.mark.parametrize(
    "span", [(0.0, 1.0), (0.0, 4e9), (1.71, 1.74), (-3.0, 5.0), (0.0, 3e-4)]
)
def test_ticks_are_few_and_inside(span):
    ticks = _ticks(*span)
    assert 2 <= len(ticks) <= 7
    assert span[0] - 1e-9 <= ticks[0] and ticks[-1] <= span[1] * (1 + 1e-9)


def test_a_name_is_text_in_the_curves(tmp_path):
    run = make_run(tmp_path / "x", "tiny", seed=0)
    (one,) = read_runs([run])
    drawn = learning([dataclasses.replace(one, name="<b>&")], "loss")
    assert "<b>" not in drawn and "&lt;b&gt;&amp;, validation" in drawn
