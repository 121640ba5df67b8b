"""How a cut is spread: budgets kept, order of layers no matter, limits held."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.compress.allocate import (
    Part,
    _lower_hull,
    by_curve,
    by_influence,
    candidates,
    check_cut,
    nearest_widths,
)
from uoe_jax.errors import ConfigError

seeds = st.integers(0, 2**31)


def parts_of(seed, count=3, size=5):
    rng = np.random.default_rng(seed)
    widths = np.arange(1, size + 1)
    fall = lambda: np.append(np.sort(rng.random(size - 1))[::-1], 0.0)
    return [
        Part(n, "mlp", widths, fall(), widths * float(rng.integers(1, 4)))
        for n in range(count)
    ]


def totals(parts, widths):
    places = [list(p.widths).index(w) for p, w in zip(parts, widths, strict=True)]
    pairs = list(zip(parts, places, strict=True))
    return sum(p.errors[i] for p, i in pairs), sum(p.costs[i] for p, i in pairs)


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(0.3, 1.0))
def test_curves_keep_the_budget_and_come_near_the_best(seed, share):
    """Against every combination; off by no more than one step of one part's hull.

    A step of a hull may skip widths, so it may save more than any one width does.
    """
    parts = parts_of(seed)
    budget = share * sum(p.costs[-1] for p in parts)
    widths = by_curve(parts, budget)
    error, cost = totals(parts, widths)
    assert cost <= budget + 1e-9
    found = [totals(parts, w) for w in itertools.product(*(p.widths for p in parts))]
    best = min(e for e, c in found if c <= budget + 1e-9)
    hulls = [(p, _lower_hull(p.costs, p.errors)) for p in parts]
    step = max(float(-np.diff(p.errors[hull]).min()) for p, hull in hulls)
    assert best - 1e-12 <= error <= best + step + 1e-9


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_curves_follow_their_parts_not_their_places(seed):
    parts = parts_of(seed, count=4)
    order = np.random.default_rng(seed).permutation(4)
    budget = 0.6 * sum(p.costs[-1] for p in parts)
    widths = by_curve(parts, budget)
    other = by_curve([parts[i] for i in order], budget)
    assert totals(parts, widths)[0] == pytest.approx(
        totals([parts[i] for i in order], other)[0], abs=1e-12
    )
    assert (other == widths[order]).all()


def test_a_cut_that_parts_have_not_got_is_refused_with_the_most_they_have():
    parts = [
        Part(
            0, "mlp", np.array([2, 10]), np.array([1.0, 0.0]), np.array([20.0, 100.0])
        ),
        Part(0, "pairs", np.array([1, 4]), np.array([1.0, 0.0]), np.array([9.0, 36.0])),
    ]
    check_cut(parts, 107 / 136, 136.0)
    with pytest.raises(ConfigError, match="cut is 0.8; .* at most 0.786 can go"):
        check_cut(parts, 0.8, 136.0)
    with pytest.raises(ConfigError, match="at most 0.428 can go"):
        check_cut(parts, 0.5, 250.0)


def test_a_budget_for_everything_keeps_everything():
    parts = parts_of(1)
    assert (by_curve(parts, sum(p.costs[-1] for p in parts)) == 5).all()
    with pytest.raises(ConfigError, match="what the least widths cost; cut less"):
        by_curve(parts, 0.5)


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(0.0, 0.9), st.floats(0.05, 100))
def test_influence_spreads_the_whole_cut_within_the_cap(seed, cut, temperature):
    rng = np.random.default_rng(seed)
    influences = rng.exponential(size=9)
    found = by_influence(influences, cut, temperature)
    assert abs(found.mean() - cut) < 1e-9
    assert (found >= 0).all() and (found <= 0.95 + 1e-9).all()
    # The more a layer changes, the less it loses.
    assert (np.diff(found[np.argsort(influences)]) <= 1e-12).all()
    order = rng.permutation(9)
    assert (
        np.abs(by_influence(influences[order], cut, temperature) - found[order]).max()
        < 1e-12
    )
    assert np.abs(by_influence(influences, cut, 1e6) - cut).max() < 1e-5


def test_a_cut_above_the_cap_is_refused():
    with pytest.raises(
        ConfigError, match=r"cut is 0.97; a layer can lose at most 0.95"
    ):
        by_influence(np.ones(3), 0.97)


def test_widths_are_multiples_and_the_whole():
    assert list(candidates(20, 8)) == [8, 16, 20]
    assert list(candidates(32, 1))[:2] == [2, 3]  # a twentieth is kept
    assert list(candidates(4, 8)) == [4]
    part = Part(0, "mlp", candidates(20, 8), np.zeros(3), np.zeros(3))
    assert list(nearest_widths([part] * 3, [0.1, 0.7, 1.0])) == [8, 16, 20]
