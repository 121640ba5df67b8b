"""A split that leaks looks good, an honest one doesn't: on a synthetic copy."""

import importlib.util
import math
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "gemm_paper.py"
SPEC = importlib.util.spec_from_file_location("gemm_paper", PATH)
gemm_paper = importlib.util.module_from_spec(SPEC)
sys.modules["gemm_paper"] = gemm_paper
SPEC.loader.exec_module(gemm_paper)


@pytest.fixture(scope="module")
def rows():
    """A grid as the paper's: sizes and kernels matter, blocks and flags don't."""
    rng = np.random.default_rng(0)
    slow = {"nn": 1.0, "nt": 1.05, "tn": 0.95, "tt": 1.1}
    found = []
    sides = (512, 1024, 2048)
    for m, n, k in product((*sides, 128256), sides, sides):
        for layout, block, flag in product(slow, range(3), ("nn", "tt")):
            row = {
                "m": float(m), "n": float(n), "k": float(k), "alpha": 1.0, "beta": 0.0,
                "kernel_layout": layout, "layout_flag": flag, "block": (str(block),),
                "watts": None,
            }  # fmt: skip
            tiles = math.ceil(m / 128) * math.ceil(n / 128)
            waves = math.ceil(tiles / gemm_paper.UNITS)
            each = 2 * 128 * 128 * k / (gemm_paper.PEAK / gemm_paper.UNITS)
            noise = float(np.exp(rng.normal(0, 0.005)))
            row["runtime_ms"] = (1.2e3 * waves * each + 0.01) * slow[layout] * noise
            found.append(row)
    return found


def test_the_settings_that_do_nothing_are_seen(rows):
    assert gemm_paper.inert(rows, "block") < 0.002
    assert gemm_paper.inert(rows, "layout_flag") < 0.002
    assert gemm_paper.inert(rows, "kernel_layout") < 1e-9  # it is part of what is equal


def test_a_leaking_split_looks_good_and_an_honest_one_does_not(rows):
    recipe = lambda: gemm_paper.Paper("runtime_ms")
    leaking = gemm_paper.judge(
        recipe, rows, gemm_paper.random_split(rows), "runtime_ms"
    )
    honest = gemm_paper.judge(recipe, rows, gemm_paper.shape_split(rows), "runtime_ms")
    assert leaking["r2"] >= 0.98
    assert honest["r2"] < 0.9
    assert honest["mean_error"] > 2 * leaking["mean_error"]


def test_a_table_without_any_model_passes_the_leaking_split(rows):
    recipe = lambda: gemm_paper.Lookup("runtime_ms")
    split = gemm_paper.random_split(rows)
    leaking = gemm_paper.judge(recipe, rows, split, "runtime_ms")
    assert leaking["r2"] > 0.98 and leaking["mean_error"] < 0.08


def test_waves_carry_over_to_unseen_shapes(rows):
    found = gemm_paper.judge(
        gemm_paper.Waves, rows, gemm_paper.shape_split(rows), "runtime_ms"
    )
    assert found["median_error"] < 0.10
    plain = gemm_paper.judge(
        lambda: gemm_paper.Paper("runtime_ms"), rows, gemm_paper.shape_split(rows),
        "runtime_ms",
    )  # fmt: skip
    assert found["mean_error"] < plain["mean_error"] / 2


def test_no_shape_is_on_both_sides(rows):
    folds = gemm_paper.shape_split(rows)
    shapes = [{gemm_paper.shape_of(rows[i]) for i in fold} for fold in folds]
    assert sum(map(len, shapes)) == len(set().union(*shapes)) == 36
