from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.compare import assert_close
from tests.ops import ops_oracle
from uoe_jax.ops import Packing, combine_rows, gather_rows, pack_choices
from uoe_jax.ops.counting import BLOCK, count_choices
from uoe_jax.ops.packing import sort_choices

pytestmark = pytest.mark.both_jax

BATCH, LENGTH, EXPERTS = 3, 7, 5
seeds = st.integers(0, 2**32 - 1)


def random_choices(rng, top_k, skew=0.0):
    """Distinct picks; a positive skew leaves some experts without tokens."""
    score = rng.random((BATCH, LENGTH, EXPERTS)) + skew * np.arange(EXPERTS)
    return np.argsort(score, axis=-1)[..., :top_k].astype(np.int32)


@settings(deadline=None, max_examples=25)
@given(seeds, st.integers(1, EXPERTS), st.sampled_from([0.0, 2.0]))
def test_rows_are_sorted_and_offsets_bound_them(seed, top_k, skew):
    choices = random_choices(np.random.default_rng(seed), top_k, skew)
    packing = jax.jit(pack_choices, static_argnums=1)(choices, EXPERTS)
    want = sorted((int(e), b, t) for (b, t, _), e in np.ndenumerate(choices))
    tokens = [b * LENGTH + t for _, b, t in want]
    np.testing.assert_array_equal(packing.token_ids, tokens)
    counts = np.zeros((EXPERTS, BATCH), int)
    for e, b, _ in want:
        counts[e, b] += 1
    segments = np.concatenate([[0], np.cumsum(counts.reshape(-1))])
    np.testing.assert_array_equal(packing.segment_offsets, segments)
    np.testing.assert_array_equal(packing.group_offsets, segments[::BATCH])
    # Row of every pick: it is that token's, and lies in that expert's group.
    rows = np.asarray(packing.row_ids).reshape(BATCH, LENGTH, top_k)
    for (b, t, x), e in np.ndenumerate(choices):
        assert want[rows[b, t, x]] == (e, b, t)


@pytest.mark.parametrize("length", [LENGTH, 2 * BLOCK], ids=["odd", "blocks"])
@pytest.mark.parametrize("drop", [False, True], ids=["all", "some"])
def test_counting_gives_what_sorting_gives(length, drop, rng):
    count = jax.jit(count_choices, static_argnums=1)
    order = jax.jit(sort_choices, static_argnums=1)
    for skew in (0.0, 2.0):
        score = rng.random((BATCH, length, EXPERTS)) + skew * np.arange(EXPERTS)
        choices = np.argsort(score, axis=-1)[..., :2].astype(np.int32)
        kept = rng.random(choices.shape) < 0.5 if drop else None
        counted = count(choices, EXPERTS, kept)
        for ours, theirs in zip(counted, order(choices, EXPERTS, kept), strict=True):
            assert ours.dtype == theirs.dtype == jnp.int32
            np.testing.assert_array_equal(ours, theirs)


def test_counting_works_where_devices_hold_different_samples(rng):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    choices = random_choices(rng, 2)[:1].repeat(4, axis=0)

    def local(choices):
        return count_choices(choices, EXPERTS)[1]

    split = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    rows = jax.jit(split)(choices).reshape(4, LENGTH, 2)
    for row in rows:
        np.testing.assert_array_equal(row, local(jnp.asarray(choices[:1])))


def test_packing_shapes_and_types(rng):
    choices = random_choices(rng, 2)
    packing = pack_choices(jnp.asarray(choices), EXPERTS)
    shapes = [(42,), (21, 2), (EXPERTS * BATCH + 1,), (EXPERTS + 1,)]
    assert [x.shape for x in packing] == shapes
    assert {x.dtype for x in packing} == {jnp.dtype("int32")}


def test_gather_and_combine_are_each_others_transpose(rng):
    packing = pack_choices(jnp.asarray(random_choices(rng, 3)), EXPERTS)
    x = jnp.asarray(rng.normal(size=(21, 4)), jnp.float32)
    rows = jnp.asarray(rng.normal(size=(63, 4)), jnp.float32)
    matrix = np.zeros((63, 21))
    matrix[np.arange(63), np.asarray(packing.token_ids)] = 1
    # Sums of at most 3 terms: float32 rounding alone.
    for fun, arg, other, m in (
        (gather_rows, x, rows, matrix),
        (combine_rows, rows, x, matrix.T),
    ):
        out, vjp = jax.vjp(lambda a, f=fun: f(a, packing), arg)
        assert_close(out, m @ np.asarray(arg), 1e-5)
        assert_close(vjp(other)[0], m.T @ np.asarray(other), 1e-5)


def test_nothing_is_scattered_in_either_direction(rng):
    choices = random_choices(rng, 2)
    packing = pack_choices(jnp.asarray(choices), EXPERTS)

    def both(x, packing):
        return combine_rows(gather_rows(x, packing), packing)

    def grad(x, g, packing):
        return jax.vjp(lambda x: both(x, packing), x)[1](g)

    x = jnp.ones((21, 4))
    assert not [p for p in ops_oracle.primitives(grad, x, x, packing) if "scat" in p]


def test_bfloat16_rows_are_summed_in_float32():
    # 256 + 1 is not a bfloat16; summed in bfloat16 the two ones would be lost.
    rows = jnp.asarray([[256.0], [1.0], [1.0]], jnp.bfloat16)
    packing = Packing(
        token_ids=jnp.zeros(3, jnp.int32),
        row_ids=jnp.arange(3, dtype=jnp.int32)[None],
        segment_offsets=jnp.arange(4, dtype=jnp.int32),
        group_offsets=jnp.arange(4, dtype=jnp.int32),
    )
    out = combine_rows(rows, packing)
    assert out.dtype == jnp.bfloat16 and float(out[0, 0]) == 258.0


def test_too_many_row_keys_are_refused():
    choices = jax.ShapeDtypeStruct((2**16, 2**10, 1), jnp.int32)
    with pytest.raises(ValueError, match="make the batch per device smaller"):
        jax.eval_shape(lambda c: pack_choices(c, 64), choices)
