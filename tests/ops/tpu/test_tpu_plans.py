"""What the TPU kernels visit, checked by counting; no kernel runs here."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.ops import measured, tpu
from uoe_jax.ops.grouped_matmul.tpu import mosaic as grouped
from uoe_jax.ops.grouped_matmul.tpu.schedule import computed_rows, work_items
from uoe_jax.ops.segment_attention.call import Mask
from uoe_jax.ops.segment_attention.tpu import mosaic as attention
from uoe_jax.ops.segment_attention.tpu.schedule import (
    FEW_EDGES,
    computed_pairs,
    needed_pairs,
    read_tile,
    segment_edges,
    visible_ranges,
)
from uoe_jax.presets import PRESETS

ROWS = 1536
cuts = st.lists(st.integers(0, ROWS), min_size=5, max_size=5).map(sorted)


@settings(deadline=None, max_examples=10)
@given(cuts, st.booleans(), st.booleans(), st.sampled_from([None, 1, 100, 700]))
def test_tiles_and_chunks_cover_what_rows_see_once(cuts, causal, seen_by, window):
    rows, chunk = 256, 512
    edges = segment_edges(jnp.asarray([0, *cuts]), ROWS)
    ranges = visible_ranges(edges, rows, causal=causal, window=window, seen_by=seen_by)
    low, high = np.asarray(ranges.bounds)
    scalars = np.asarray(ranges.tiles)
    sides = "both" if not causal else "right" if seen_by else "left"
    for index in range(ROWS // rows):
        tile = read_tile(scalars, index, rows, chunk, sides)
        own = slice(index * rows, (index + 1) * rows)
        if not tile.live:
            assert (low[own] == high[own]).all()
            continue
        visits = np.zeros(ROWS, int)
        visits[own] += 1  # the diagonal
        for number in range(int(tile.num_chunks)):
            first, size = map(int, tile.piece(number))
            assert 0 < size <= chunk and size % 128 == 0
            visits[first : first + size] += 1
            alone, start = tile.half_that_sees(first, size)
            if alone:
                blind = slice(own.start, own.start + rows // 2)
                if not int(start):
                    blind = slice(own.start + rows // 2, own.stop)
                seen = (low[blind] < first + size) & (high[blind] > first)
                assert not seen.any()
            if tile.all_see(first, size):
                assert (low[own] <= first).all() and (high[own] >= first + size).all()
        assert visits.max() == 1
        for row in range(own.start, own.stop):
            assert visits[low[row] : high[row]].all()


@settings(deadline=None, max_examples=10)
@given(cuts)
def test_many_edges_give_the_same_ranges_as_few(cuts):
    offsets = np.asarray([0, *cuts])
    many = np.concatenate([offsets, np.full(FEW_EDGES, cuts[-1])])
    few = segment_edges(jnp.asarray(offsets), ROWS)
    np.testing.assert_array_equal(few, segment_edges(jnp.asarray(many), ROWS))


@settings(deadline=None, max_examples=10)
@given(cuts, st.sampled_from([128, 512]))
def test_work_items_cover_each_row_once_by_its_group(cuts, tile):
    offsets = np.asarray([0, *cuts])
    items = [np.asarray(a) for a in work_items(jnp.asarray(offsets), ROWS, tile)]
    owner = np.full(ROWS, -1)
    for number, group, start, end, fetch in zip(*items, strict=True):
        assert number * tile <= start or start == end
        assert end <= (number + 1) * tile
        assert (owner[start:end] == -1).all()
        owner[start:end] = group
        assert fetch == group or start == end
    want = np.searchsorted(offsets, np.arange(ROWS), side="right") - 1
    want[np.arange(ROWS) >= cuts[-1]] = -1
    np.testing.assert_array_equal(owner, want)
    # A kernel writes a block back when it leaves it: no block may be left twice.
    for visited, expect in ((items[0], ROWS // tile), (items[1], len(offsets) - 1)):
        assert (np.diff(visited) >= 0).all()
        assert set(visited) == set(range(expect))


def test_half_of_the_experts_take_within_a_tenth_of_the_floor():
    # T 8192, 16 experts, 8 a token, as a random router gives them.
    rng = np.random.default_rng(0)
    sizes = rng.binomial(8192, 0.5, size=16)
    offsets = jnp.asarray(np.concatenate([[0], np.cumsum(sizes)]), jnp.int32)
    rows = int(offsets[-1])
    target = tpu.Target("TPU v5e")
    options = attention.make_options(
        target, (rows, 1, 128), jnp.bfloat16, 16, mask=Mask(causal=True), scale=1.0
    )
    how = dict(causal=True, window=None)
    need = needed_pairs(offsets, rows, **how)
    forward = computed_pairs(offsets, rows, options.rows, options.chunk, **how)
    keys = computed_pairs(
        offsets, rows, options.key_rows, options.key_chunk, seen_by=True, **how
    )
    assert need <= forward <= 1.1 * need
    assert need <= keys <= 1.1 * need
    tiles = grouped.choose_tiles(
        target, "grouped_matmul", rows, 2048, 384, jnp.bfloat16
    )
    assert rows <= computed_rows(offsets, rows, tiles.rows) <= 1.1 * rows


@pytest.mark.parametrize("generation", tpu.GENERATIONS.values(), ids=lambda g: g.name)
def test_tiles_fit_the_memory_of_every_generation(generation):
    target = tpu.Target(generation.kinds[0])
    limit, dtype = generation.vmem_bytes * 3 // 4, jnp.bfloat16
    how = dict(mask=Mask(causal=True), scale=1.0)
    for groups, width in ((1, 64), (4, 128), (8, 256)):
        shape = (65_536, groups, width)
        options = attention.make_options(target, shape, dtype, 16, **how)
        assert options.vmem <= limit
    for name, make in PRESETS.items():
        config = make()
        model, experts = config.model, config.model.union.num_experts
        tokens = 4 * config.seq_len
        groups, width = model.num_query_groups, model.head_dim
        shape = (tokens * model.union.top_k, groups, width)
        options = attention.make_options(target, shape, dtype, 4 * experts, **how)
        assert options.vmem <= limit, name
        d, hidden = model.d_model, model.d_ff // experts
        heads = model.num_kv_heads // experts
        for depth, out, kinds in (
            (d, heads * (groups + 2) * width, grouped.PICKED),
            (heads * groups * width, d, grouped.SUMMED),
            (d, 2 * hidden, grouped.PICKED),
            (hidden, d, grouped.SUMMED),
        ):
            w = jax.ShapeDtypeStruct((experts, depth, out), dtype)
            if not grouped.fits(target, shape[0], w, kinds):
                assert name.startswith("7b") and generation.name == "v4"
                kinds = grouped.PLAIN
            grouped.check_tiles(target, shape[0], w, kinds)
            for op, rows in zip(("", "_dw"), kinds[::2], strict=True):
                sides = (shape[0], depth, out, dtype, rows)
                tiles = grouped.choose_tiles(target, f"grouped_matmul{op}", *sides)
                assert tiles.vmem <= limit, (name, op, sides)


def test_a_tuning_table_overrides_the_model(tmp_path, monkeypatch):
    shape = {"inner": 2048, "outer": 384, "dtype": "bfloat16", "rows": "plain"}
    table = {"tiles": {"grouped_matmul": [{"shape": shape, "tile": {"rows": 128}}]}}
    (tmp_path / "tpu_v5_lite.json").write_text(json.dumps(table))
    monkeypatch.setenv(measured.FOLDER, str(tmp_path))
    sides = ("grouped_matmul", 65_536, 2048, 384, jnp.bfloat16)
    tiles = {
        kind: grouped.choose_tiles(tpu.Target(kind), *sides).rows
        for kind in ("TPU v5 lite", "TPU v5e", "TPU v4")
    }
    assert tiles == {"TPU v5 lite": 128, "TPU v5e": 128, "TPU v4": 512}


def test_tiles_can_be_overridden():
    options = dict(mask=Mask(causal=True), scale=1.0)
    with tpu.compiling_for("TPU v5e", rows=128, key_chunk=256):
        target = tpu.current_target()
        chosen = attention.make_options(
            target, (65_536, 1, 128), jnp.bfloat16, 16, **options
        )
    assert (chosen.rows, chosen.key_chunk) == (128, 256)


def test_without_a_tpu_the_reason_is_said():
    with pytest.raises(NotImplementedError, match="needs a TPU"):
        tpu.current_target()
