from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops import ops_oracle
from uoe_jax.ops import segment_attention

ROWS, SEGMENTS = 96, 6  # the blocks have 16 rows
IMPLEMENTATIONS = ["xla", "reference"]  # those that run on any device
# Sums of up to 96 products in float32.
TOLERANCE = 5e-6


@functools.partial(
    jax.jit, static_argnames=("implementation", "causal", "window", "scale")
)
def value_and_grads(q, k, v, offsets, grad, **options):
    def attend(q, k, v):
        return segment_attention(q, k, v, offsets, **options)

    out, vjp = jax.vjp(attend, q, k, v)
    return out, *vjp(grad)


def draw(rng, groups, width, dtype=np.float32):
    shapes = (ROWS, groups, width), (ROWS, width), (ROWS, width), (ROWS, groups, width)
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


# Ends of segments: repeats make empty ones, neighbours make segments of one row.
cuts = st.lists(st.integers(0, ROWS), min_size=SEGMENTS, max_size=SEGMENTS).map(sorted)


@pytest.mark.both_jax
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("causal", "window", "groups", "width", "scale"),
    [
        (True, None, 1, 32, None),
        (True, 20, 4, 16, 0.4),
        (False, None, 4, 64, None),
        (False, 20, 1, 128, None),
    ],
)
def test_value_and_gradients_match_float64(
    implementation, causal, window, groups, width, scale
):
    @settings(deadline=None, max_examples=12)
    @given(cuts, st.integers(0, 2**32 - 1))
    def check(cuts, seed):
        q, k, v, grad = draw(np.random.default_rng(seed), groups, width)
        offsets = [0, *cuts]
        got = value_and_grads(
            q,
            k,
            v,
            jnp.asarray(offsets),
            grad,
            causal=causal,
            window=window,
            scale=scale,
            implementation=implementation,
        )
        visible = ops_oracle.segment_visible(offsets, ROWS, causal, window)
        factor = width**-0.5 if scale is None else scale
        want = ops_oracle.attention(q, k, v, grad, visible, factor)
        ops_oracle.assert_near(got, want, TOLERANCE)

    check()


@pytest.mark.both_jax
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_past_the_end_are_zero_and_never_read(implementation):
    q, k, v, grad = draw(np.random.default_rng(), 1, 32)
    offsets = jnp.asarray([0, 9, 9, 40, 41, 60, 70])
    options = {"causal": True, "window": None, "implementation": implementation}
    clean = value_and_grads(q, k, v, offsets, grad, **options)
    # The oracle masks with products, so only the shipped path is fed nan queries.
    if implementation != "reference":
        q = q.at[70:].set(jnp.nan)
    k, v = k.at[70:].set(jnp.nan), v.at[70:].set(jnp.nan)
    for got, want in zip(
        value_and_grads(q, k, v, offsets, grad, **options), clean, strict=True
    ):
        np.testing.assert_array_equal(got, want)
        assert not np.asarray(got[70:]).any() and np.abs(got[:70]).max() > 0


@pytest.mark.both_jax
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_later_rows_and_other_segments_have_no_influence(implementation):
    rng = np.random.default_rng()
    q, k, v, grad = draw(rng, 1, 32)
    offsets = jnp.asarray([0, 9, 9, 40, 41, 80, 96])
    options = {"causal": True, "window": None, "implementation": implementation}
    before = value_and_grads(q, k, v, offsets, grad, **options)[0]
    row = int(rng.integers(42, 80))
    after = value_and_grads(
        q, k.at[row].add(3), v.at[row].add(3), offsets, grad, **options
    )[0]
    changed = np.asarray(before != after).any(axis=(1, 2))
    assert changed[row:80].all()
    assert not changed[:row].any() and not changed[80:].any()


@pytest.mark.both_jax
def test_bfloat16_is_as_near_as_its_rounding():
    q, k, v, grad = draw(np.random.default_rng(), 1, 32, jnp.bfloat16)
    offsets = [0, 9, 9, 40, 41, 60, 96]
    got = value_and_grads(
        q,
        k,
        v,
        jnp.asarray(offsets),
        grad,
        causal=True,
        window=None,
        implementation="xla",
    )
    assert {x.dtype for x in got} == {jnp.dtype("bfloat16")}
    visible = ops_oracle.segment_visible(offsets, ROWS, True, None)
    want = ops_oracle.attention(q, k, v, grad, visible, 32**-0.5)
    # Weights and results are rounded once each: two half-steps of 2^-8, and slack.
    ops_oracle.assert_near(got, want, 2 * 2**-8)


@pytest.mark.both_jax
def test_no_rows_give_no_rows():
    q, k = jnp.zeros((0, 2, 8)), jnp.zeros((0, 8))
    assert segment_attention(q, k, k, jnp.zeros(3, int), causal=True).shape == q.shape


@pytest.mark.both_jax
@pytest.mark.parametrize("causal", [True, False])
def test_vmap_equals_a_loop(causal):
    rng = np.random.default_rng()
    batch = [draw(rng, 2, 16)[:3] for _ in range(2)]
    offsets = jnp.asarray([[0, 9, 9, 40, 96], [0, 96, 96, 96, 96]])
    attend = functools.partial(segment_attention, causal=causal)
    got = jax.jit(jax.vmap(attend))(*map(jnp.stack, zip(*batch, strict=True)), offsets)
    for out, rows, cut in zip(got, batch, offsets, strict=True):
        want = segment_attention(*rows, cut, causal=causal, implementation="reference")
        np.testing.assert_allclose(out, want, atol=TOLERANCE)


@pytest.mark.parametrize("causal", [True, False])
def test_memory_grows_with_the_rows_not_their_square(causal):
    def grads(q, k, v):
        offsets = jnp.asarray([0, q.shape[0] // 2, q.shape[0]])

        def total(q, k, v):
            return segment_attention(q, k, v, offsets, causal=causal).sum()

        return jax.grad(total, (0, 1, 2))(q, k, v)

    sizes = []
    for num_rows in (4096, 8192):
        q, k = jnp.zeros((num_rows, 1, 16)), jnp.zeros((num_rows, 16))
        # Both passes are in it; every array they make is bounded.
        assert ops_oracle.largest_result(grads, q, k, k) <= 8192 * 64
        compiled = jax.jit(grads).lower(q, k, k).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[1] < 2.2 * sizes[0]  # a square would be 4 times
