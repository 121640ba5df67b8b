"""Keys put before the queries of their segment: the same attention as to lists."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from uoe_jax.errors import ConfigError
from uoe_jax.ops.as_segments import (
    LIST_BACKENDS,
    MASKED,
    Lists,
    list_attention,
    merge,
    merged_attention,
)

pytestmark = pytest.mark.both_jax

ROWS, GROUPS, WIDTH, LISTS, KEYS = 24, 2, 4, 4, 6
NUMBERS = {"max_rows": ROWS, "scale": 0.7}


def any_bounds(call):
    """Segment attention and its logsumexp written out; a row may see nothing at all."""
    assert call.mask == (False, None)
    q, k, v, offsets, scale = call.q, call.k, call.v, call.offsets, call.scale
    row = jnp.arange(q.shape[0])
    low, high = call.bounds
    seen = (row[None] >= low[:, None]) & (row[None] <= high[:, None])
    segment = jnp.searchsorted(offsets, row, side="right")
    seen &= (segment[None] == segment[:, None]) & (row < offsets[-1])[:, None]
    s = jnp.einsum("mgh,nh->mgn", q, k) * scale
    top = jnp.max(s, axis=-1, keepdims=True)
    p = jnp.exp(s - top) * seen[:, None]
    some = jnp.any(seen, axis=1)[:, None, None]
    total = jnp.where(some, jnp.sum(p, -1)[..., None], 1)
    lse = jnp.where(some, top + jnp.log(total), MASKED)[..., 0]
    return jnp.einsum("mgn,nh->mgh", p / total, v), lse


def draw_call(seed, dtype=jnp.float32, width=WIDTH):
    """A call's arrays: empty segments, queries past the last, bounds past the lists,
    some that see nothing."""
    draw = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(draw.normal(size=shape), dtype)
    q = normal(ROWS, GROUPS, width)
    k, v = normal(LISTS, KEYS, width), normal(LISTS, KEYS, width)
    offsets = np.sort(draw.integers(0, ROWS + 1, LISTS + 1))
    offsets[0] = 0
    first, last = draw.integers(-2, KEYS + 2, (2, ROWS))
    return q, k, v, *(jnp.asarray(a, jnp.int32) for a in (offsets, first, last))


def value_and_gradients(run, call):
    q, k, v, *rest = call
    found, vjp = jax.vjp(lambda *qkv: run(Lists(*qkv, *rest, **NUMBERS)), q, k, v)
    wave = lambda a: jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape)
    return *found, *vjp(jax.tree.map(wave, found))


both = jax.jit(
    lambda call: [
        value_and_gradients(run, call)
        for run in (
            partial(merged_attention, any_bounds),
            LIST_BACKENDS["xla"],
        )
    ]
)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_merged_rows_are_the_lists(seed):
    got, wanted = both(draw_call(seed))
    for mine, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_every_key_and_query_has_its_row(seed):
    _, _, _, offsets, first, last = draw_call(seed)
    merged = merge(offsets, first, last, KEYS)
    keys, queries = (p.row_ids[:, 0] for p in (merged.keys, merged.queries))
    both = np.concatenate([keys, queries])
    np.testing.assert_array_equal(np.sort(both), np.arange(ROWS + LISTS * KEYS))
    np.testing.assert_array_equal(merged.keys.token_ids[keys], np.arange(LISTS * KEYS))
    np.testing.assert_array_equal(merged.queries.token_ids[queries], np.arange(ROWS))
    assert np.all(np.asarray(merged.high)[keys] == -1)
    inside = np.asarray(queries) < int(merged.offsets[-1])
    np.testing.assert_array_equal(inside, np.arange(ROWS) < int(offsets[-1]))


def test_a_wrong_call_is_told():
    q, k, v, offsets, first, last = draw_call(0)
    with pytest.raises(ConfigError, match="3 segments; give each segment one list"):
        Lists(q, k, v, offsets[1:], first, last, max_rows=ROWS)
    with pytest.raises(ConfigError, match="it needs a Hopper GPU, not cpu.*use triton"):
        lists = Lists(q, k, v, offsets, first, last, max_rows=ROWS)
        list_attention(lists, implementation="mosaic_gpu")


def test_merged_rows_in_shard_map_are_one_devices():
    """Offsets and bounds differ between devices, constants don't: types must agree."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    calls = [draw_call(seed) for seed in range(8)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *calls)

    def run(call):
        got, lse = merged_attention(any_bounds, Lists(*call, **NUMBERS))
        return jnp.sum(got**2) + jnp.sum(jnp.where(lse > MASKED, lse, 0))

    def local(call):
        return jax.lax.psum(run(jax.tree.map(lambda a: a[0], call)), "data")

    def total(qkv, rest):
        whole = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P())
        return whole((*qkv, *rest))

    grads = jax.jit(jax.grad(total))(stacked[:3], stacked[3:])
    alone = jax.jit(jax.grad(lambda qkv, rest: run((*qkv, *rest))))
    wanted = [alone(call[:3], call[3:]) for call in calls]
    for got, want in zip(grads, zip(*wanted, strict=True), strict=True):
        np.testing.assert_allclose(got, jnp.stack(want), atol=1e-5)
