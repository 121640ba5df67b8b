from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.ops.tpu import tpu_oracle
from uoe_jax.ops import pack_choices
from uoe_jax.ops.grouped_matmul import reference
from uoe_jax.ops.grouped_matmul.tpu import mosaic as mosaic_tpu

ROWS, GROUPS = 500, 4
TOLERANCE = 1e-5  # sums of up to 500 products in float32, of values up to about 5


def differentiated(operation, x, w, where, grad):
    out, vjp = jax.vjp(lambda x, w: operation(x, w, where), x, w)
    return [out, *vjp(grad)]


def pair(name):
    kernels = jax.jit(functools.partial(differentiated, getattr(mosaic_tpu, name)))
    return kernels, functools.partial(differentiated, getattr(reference, name))


def draw(rng, *shapes):
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(
    ("depth", "width", "tiles"),
    [
        (40, 72, {"rows": 256}),  # narrower than a register
        (256, 200, {"rows": 256, "inner": 128, "outer": 128}),  # sums in two steps
    ],
)
def test_value_and_gradients_match_float64(depth, width, tiles):
    kernels, oracle = pair("grouped_matmul")

    @settings(deadline=None, max_examples=1)
    @given(
        st.lists(st.integers(0, ROWS), min_size=GROUPS, max_size=GROUPS).map(sorted),
        st.integers(0, 2**32 - 1),
    )
    # An empty group, one inside a tile, one over tiles, and rows of no group.
    @example([0, 10, 400, 480], 0)
    def check(cuts, seed):
        rng = np.random.default_rng(seed)
        shapes = (ROWS, depth), (GROUPS, depth, width), (ROWS, width)
        x, w, grad = draw(rng, *shapes)
        offsets = jnp.asarray([0, *cuts], jnp.int32)
        # Nothing that stands in rows of no group may show.
        x = x.at[cuts[-1] :].set(jnp.nan)
        grad = grad.at[cuts[-1] :].set(jnp.nan)
        got, races = tpu_oracle.interpreted(kernels, x, w, offsets, grad, **tiles)
        assert not races
        x, grad = (a.at[cuts[-1] :].set(0) for a in (x, grad))
        want = tpu_oracle.in_float64(oracle, x, w, offsets, grad)
        tpu_oracle.assert_close(got, want, TOLERANCE)

    check()


@pytest.mark.parametrize("name", ["gather_project", "project_scatter"])
def test_gather_and_scatter_match_float64(name):
    kernels, oracle = pair(name)
    rng = np.random.default_rng(3)
    batch, length, top_k, width = 2, 75, 2, 256
    scores = rng.normal(size=(batch, length, GROUPS))
    choices = jnp.asarray(np.argsort(scores, axis=-1)[..., :top_k])
    # A third of the picks found no room, and the packing has no rows for them.
    kept = jnp.asarray(rng.random(choices.shape) < 0.6)
    num_rows = 260  # the last tile is half empty
    assert int(kept.sum()) <= num_rows
    packing = pack_choices(choices, GROUPS, kept, num_rows)
    tokens = batch * length
    if name == "gather_project":
        shapes = (tokens, width), (GROUPS, width, 64), (num_rows, 64)
    else:
        shapes = (num_rows, 64), (GROUPS, 64, width), (tokens, width)
    x, w, grad = draw(rng, *shapes)
    got, races = tpu_oracle.interpreted(kernels, x, w, packing, grad, rows=256)
    assert not races
    want = tpu_oracle.in_float64(oracle, x, w, packing, grad)
    tpu_oracle.assert_close(got, want, TOLERANCE)
