from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import ops_oracle
from uoe_jax.ops import dense_attention

pytestmark = pytest.mark.both_jax

BATCH, WIDTH = 2, 16
HEADS, KV_HEADS = 4, 2
TOLERANCE = 5e-6  # sums of up to 80 products in float32


def visible_tokens(length, causal, segments, window):
    runs = np.cumsum(np.diff(segments, axis=1, prepend=segments[:, :1]) != 0, axis=1)
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    visible = runs[:, :, None] == runs[:, None, :]
    if causal:
        visible = visible & (distance >= 0)
    if window is not None:
        visible = visible & (np.abs(distance) < window)
    return visible


def oracle(q, k, v, grad, visible):
    """Head by head through the row oracle."""
    results = [np.zeros(x.shape) for x in (q, q, k, v)]
    q, k, v, grad = map(np.asarray, (q, k, v, grad))
    for b in range(BATCH):
        for head in range(KV_HEADS):
            own = slice(head * HEADS // KV_HEADS, (head + 1) * HEADS // KV_HEADS)
            parts = ops_oracle.attention(
                q[b, :, own],
                k[b, :, head],
                v[b, :, head],
                grad[b, :, own],
                visible[b],
                WIDTH**-0.5,
            )
            for result, part, heads in zip(
                results, parts, (own, own, head, head), strict=True
            ):
                result[b, :, heads] = part
    return results


# 40 tokens take the plain path on CPU, 80 the blockwise one.
@pytest.mark.parametrize(
    ("length", "implementation", "causal", "packed", "window"),
    [
        (40, "reference", True, True, 9),
        (40, "reference", False, False, None),
        (40, "xla", True, False, None),
        (40, "xla", False, True, 9),
        (80, "xla", True, False, None),
        (80, "xla", False, False, None),
        (75, "xla", True, True, 9),
        (75, "xla", False, True, None),
    ],
)
def test_value_and_gradients_match_float64(
    length, implementation, causal, packed, window
):
    rng = np.random.default_rng()
    shapes = [(BATCH, length, n, WIDTH) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    q, k, v, grad = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    # Runs of random ids, some of length one; an id can come back.
    ids = rng.integers(0, 3, (BATCH, length // 5 + 1)).repeat(5, axis=1)[:, :length]
    ids[:, 7] = 9
    attend = functools.partial(
        dense_attention,
        causal=causal,
        segments=jnp.asarray(ids) if packed else None,
        window=window,
        implementation=implementation,
    )
    out, vjp = jax.vjp(jax.jit(attend), q, k, v)
    ids = ids if packed else np.zeros_like(ids)
    want = oracle(q, k, v, grad, visible_tokens(length, causal, ids, window))
    ops_oracle.assert_near((out, *vjp(grad)), want, TOLERANCE)


def test_bfloat16_is_as_near_as_its_rounding():
    rng = np.random.default_rng()
    shapes = [(BATCH, 80, n, WIDTH) for n in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in shapes)
    visible = visible_tokens(80, True, np.zeros((BATCH, 80), int), None)
    want = oracle(q, k, v, jnp.zeros_like(q), visible)[0]
    got = dense_attention(q, k, v, causal=True)
    assert got.dtype == jnp.bfloat16
    ops_oracle.assert_near([got], [want], 2 * 2**-8)


def test_long_sequences_keep_no_square():
    x = jnp.zeros((1, 1024, 2, 16))

    def grads(x):
        attend = functools.partial(dense_attention, causal=True)
        return jax.grad(lambda q, k, v: attend(q, k, v).sum(), (0, 1, 2))(x, x, x)

    assert ops_oracle.largest_result(grads, x) < 1024 * 1024
