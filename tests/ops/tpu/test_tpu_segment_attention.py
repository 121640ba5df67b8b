from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.ops.tpu import tpu_oracle
from uoe_jax.ops.segment_attention import reference
from uoe_jax.ops.segment_attention.call import Call, Mask
from uoe_jax.ops.segment_attention.tpu import mosaic as mosaic_tpu
from uoe_jax.ops.segment_attention.tpu import parts

ROWS = 500
LARGE = {"rows": 256, "chunk": 256, "key_rows": 256, "key_chunk": 256}
SMALL = dict.fromkeys(LARGE, 128)
# Sums of up to 500 products in float32; bfloat16 has 8 bits, and rounds the weights.
TOLERANCE = {jnp.float32: 5e-6, jnp.bfloat16: 2e-2}

CASES = {
    "causal": dict(causal=True, window=None, groups=1, width=64),
    "causal window, grouped": dict(causal=True, window=170, groups=2, width=128),
    "full window, grouped": dict(causal=False, window=90, groups=2, width=192),
    "documents": dict(causal=True, window=None, groups=1, width=64, documents=True),
}


def differentiated(attend, options, q, k, v, offsets, bounds, grad):
    scale = q.shape[2] ** -0.5
    out, vjp = jax.vjp(
        lambda q, k, v: attend(
            Call(q, k, v, offsets, Mask(**dict(options)), scale, bounds)
        ),
        q,
        k,
        v,
    )
    return [out, *vjp(grad)]


kernels = jax.jit(
    functools.partial(differentiated, mosaic_tpu.segment_attention), static_argnums=0
)
oracle = functools.partial(differentiated, reference.segment_attention)


def draw(seed, groups, width, rows=ROWS, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = (rows, groups, width), (rows, width), (rows, width), (rows, groups, width)
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def runs(cuts, seed):
    """First and last row of each row's document; documents end inside segments."""
    rng = np.random.default_rng(seed)
    edges = np.unique([0, *cuts, *rng.integers(1, ROWS, size=9), ROWS])
    run = np.searchsorted(edges, np.arange(ROWS), side="right") - 1
    first, last = edges[run], edges[run + 1] - 1
    return jnp.asarray(first, jnp.int32), jnp.asarray(last, jnp.int32)


def check(case, cuts, seed, dtype=jnp.float32):
    options = dict(CASES[case])
    groups, width = options.pop("groups"), options.pop("width")
    bounds = runs(cuts, seed) if options.pop("documents", False) else None
    options = tuple(options.items())
    tiles = LARGE if groups == 1 else SMALL
    offsets = jnp.asarray([0, *cuts], jnp.int32)
    q, k, v, grad = draw(seed, groups, width, dtype=dtype)
    got, races = tpu_oracle.interpreted(
        kernels, options, q, k, v, offsets, bounds, grad, **tiles
    )
    assert not races
    want = tpu_oracle.in_float64(
        functools.partial(oracle, options), q, k, v, offsets, bounds, grad
    )
    tpu_oracle.assert_close(got, want, TOLERANCE[dtype])


cuts = st.lists(st.integers(0, ROWS), min_size=5, max_size=5).map(sorted)


@pytest.mark.parametrize(
    "case",
    [
        # The test of rows past the end holds this program to float64, too.
        pytest.param("causal", marks=pytest.mark.nightly),
        *(case for case in CASES if case != "causal"),
    ],
)
def test_value_and_gradients_match_float64(case):
    @settings(deadline=None, max_examples=1)
    @given(cuts, st.integers(0, 2**32 - 1))
    # One segment over tiles, an empty one, one in the middle of a tile, a ragged end.
    @example([330, 330, 350, 490, 490], 0)
    def run(cuts, seed):
        check(case, cuts, seed)

    run()


def test_bfloat16_accumulates_in_float32():
    check("causal", [130, 400, 400, 499, 500], 1, jnp.bfloat16)


def test_rows_past_the_last_segment_are_zero_and_reach_nothing():
    q, k, v, grad = draw(2, 1, 64)
    offsets = jnp.asarray([0, 300, 410], jnp.int32)
    options = (("causal", True), ("window", None))
    spoil = lambda x: x.at[410:].set(jnp.nan)
    spoiled = [spoil(x) for x in (q, k, v)]
    got, races = tpu_oracle.interpreted(
        kernels, options, *spoiled, offsets, None, spoil(grad), **LARGE
    )
    assert not races
    for array in got:
        assert not np.asarray(array[410:]).any()
    clean = [x.at[410:].set(0) for x in (q, k, v)]
    want = tpu_oracle.in_float64(
        functools.partial(oracle, options), *clean, offsets, None, grad.at[410:].set(0)
    )
    tpu_oracle.assert_close(got, want, TOLERANCE[jnp.float32])


def test_a_missing_wait_is_caught(monkeypatch):
    def careless(self, count, use):
        def body(index, _):
            pl_when = index + 1 < count
            jax.lax.cond(pl_when, lambda: self.start(index + 1), lambda: None)
            use(index, jax.lax.rem(index, 2))
            self._each(index, lambda copy: copy.wait())

        jax.lax.fori_loop(0, count, body, None)

    monkeypatch.setattr(parts.Ring, "run", careless)
    q, k, v, _ = draw(3, 1, 64)
    offsets = jnp.asarray([0, ROWS], jnp.int32)
    attend = lambda q, k, v: mosaic_tpu.segment_attention(
        Call(q, k, v, offsets, Mask(causal=True), 0.125)
    )
    out, races = tpu_oracle.interpreted(attend, q, k, v, **LARGE)
    assert races or not np.isfinite(np.asarray(out)).all()
