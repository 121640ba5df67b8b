"""No backend of any device makes arrays of more than its operation's own size."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from tests.ops import ops_oracle
from uoe_jax.ops import dense_attention, segment_attention
from uoe_jax.ops.grouped_matmul import serial, xla


@pytest.mark.parametrize("causal", [True, False])
def test_memory_of_segments_grows_with_the_rows_not_their_square(causal):
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


@pytest.mark.both_jax
def test_long_sequences_keep_no_square():
    x = jnp.zeros((1, 1024, 2, 16))

    def grads(x):
        attend = functools.partial(dense_attention, causal=True)
        return jax.grad(lambda q, k, v: attend(q, k, v).sum(), (0, 1, 2))(x, x, x)

    assert ops_oracle.largest_result(grads, x) < 1024 * 1024


@pytest.mark.both_jax
def test_weights_are_not_copied_once_per_block():
    x, w = jnp.zeros((4096, 64)), jnp.zeros((5, 64, 32))
    offsets = jnp.arange(6) * 800

    def grads(x, w):
        product = functools.partial(xla.grouped_matmul, blocks=serial)
        return jax.grad(lambda x, w: product(x, w, offsets).sum(), (0, 1))(x, w)

    # Nothing is larger than the rows themselves.
    assert ops_oracle.largest_result(grads, x, w) == x.size
