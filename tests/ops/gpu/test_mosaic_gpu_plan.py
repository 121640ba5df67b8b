"""The schedule of the GPU kernels: every pair that counts is met, once, and dealt."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops import ops_oracle
from uoe_jax.ops.segment_attention.call import Mask
from uoe_jax.ops.segment_attention.nvidia import schedule as plans
from uoe_jax.ops.segment_attention.nvidia.schedule import (
    ALIGN,
    END,
    FIRST,
    FULL,
    LAST,
    MASKED,
    ROW,
    SLOT,
    START,
)

ROWS, SEGMENTS, TILE, BLOCK, CORES = 120, 5, 32, 16, 3
cuts = st.lists(st.integers(0, ROWS), min_size=SEGMENTS, max_size=SEGMENTS).map(sorted)


@functools.partial(
    jax.jit, static_argnames=("by_key", "causal", "window", "with_bounds")
)
def make(offsets, bounds, by_key, causal, window, with_bounds):
    mask, rows = Mask(causal, window), None
    if with_bounds:
        rows = plans.make_rows(offsets, bounds, mask, pad=TILE)
    function = plans.key_plan if by_key else plans.query_plan
    segments = plans.Segments(offsets, ROWS, mask, rows, CORES)
    return function(segments, TILE, BLOCK)


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize(
    ("causal", "window", "with_bounds"),
    [(True, None, False), (False, None, False), (True, 9, False), (False, 9, True)],
)
def test_blocks_hold_every_pair_that_counts(by_key, causal, window, with_bounds):
    @settings(deadline=None, max_examples=10)
    @given(cuts, st.integers(1, 40))
    def check(cuts, document):
        offsets = [0, *cuts]
        first = np.arange(ROWS) // document * document
        bounds = first, first + document - 1
        arrays = (jnp.asarray(x) for x in bounds)
        plan = make(
            jnp.asarray(offsets), tuple(arrays), by_key, causal, window, with_bounds
        )
        visible = ops_oracle.segment_visible(offsets, ROWS, causal, window)
        if with_bounds:
            row = np.arange(ROWS)
            visible &= (row >= bounds[0][:, None]) & (row <= bounds[1][:, None])
        if by_key:
            visible = visible.T
        tiles = np.asarray(plan.tiles)
        rounds = int(plan.rounds[0])
        assert not (tiles[rounds:, :, END] > 0).any()
        owned = np.zeros(ROWS, int)
        for item in tiles.reshape(-1, plans.COLUMNS):
            if item[END] == 0:
                assert item[SLOT] == plans.num_tiles(ROWS, SEGMENTS, TILE)
                continue
            check_tile(item, visible, owned)
        assert (owned == 1).all()

    check()


def check_tile(item, visible, owned):
    rows = slice(max(item[ROW], item[START]), min(item[ROW] + TILE, item[END]))
    owned[rows] += 1
    origin = item[START] // ALIGN * ALIGN
    assert item[ROW] % ALIGN == 0 and (item[ROW] - origin) % TILE == 0
    met = np.zeros(ROWS + BLOCK, bool)
    for block in range(item[FIRST], item[LAST]):
        start = origin + block * BLOCK
        met[start : start + BLOCK] = True
        if item[FULL] <= block < item[MASKED]:
            assert start >= item[START] and start + BLOCK <= item[END]
            assert visible[rows, start : start + BLOCK].all()
    assert not visible[rows][:, ~met[:ROWS]].any()


def causal_plan(num_rows, block, cores):
    def make(offsets):
        segments = plans.Segments(offsets, num_rows, Mask(causal=True), None, cores)
        return plans.query_plan(segments, block, block)

    return jax.jit(make)


def test_long_and_short_tiles_share_a_core(rng):
    lengths = rng.integers(900, 1100, size=64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    plan = causal_plan(int(offsets[-1]), 128, 132)(jnp.asarray(offsets))
    tiles = np.asarray(plan.tiles)
    load = (tiles[..., LAST] - tiles[..., FIRST]).sum(axis=0)
    # Whole tiles can't be split, so the fullest core may have most of one too many.
    assert load.max() <= load.mean() + 8


def test_many_segments_and_groups_of_them_give_the_same_tiles(monkeypatch, rng):
    """Sorting and searching, and several groups, against comparing all pairs."""
    offsets = jnp.asarray(sorted(rng.integers(0, 500, size=40)))

    def tiles():
        plan = causal_plan(512, 64, 4)(offsets)
        rows = np.asarray(plan.tiles)[: int(plan.rounds[0])].reshape(-1, plans.COLUMNS)
        return sorted(map(tuple, rows[rows[:, END] > 0]))

    want = tiles()
    monkeypatch.setattr(plans, "L2_ROWS", 128)
    assert tiles() == want
    monkeypatch.setattr(plans, "SMALL", 1)
    assert tiles() == want
