"""Heads split from rows are rotated as complex numbers are, each head in a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops import ops_oracle
from uoe_jax.errors import ConfigError
from uoe_jax.ops import split_heads

pytestmark = pytest.mark.both_jax

TOKENS, ROWS, THETA = 9, 14, 100.0
# Of values up to 5, turned by up to 500 radians in float32, two roundings.
ATOL = 5 * 500 * 2.0**-23


@settings(deadline=None, max_examples=8)
@given(
    seed=st.integers(0, 2**32 - 1),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    theta=st.sampled_from([THETA, None]),
)
def test_value_and_gradient_match_float64(seed, kv_heads, groups, theta):
    call = ops_oracle.draw_heads(seed, TOKENS, ROWS, kv_heads, groups, 8)
    check(call, kv_heads=kv_heads, groups=groups, theta=theta)


def check(call, rtol=0.0, **options):
    """Values and the gradient of a call are the oracle's."""
    rows, positions, ids, grads = jax.tree.map(jnp.asarray, call)
    split = lambda rows: split_heads(rows, positions, ids, **options)

    @jax.jit
    def run(rows, grads):
        out, vjp = jax.vjp(split, rows)
        return *out, *vjp(grads)

    got = run(rows, grads)
    options.pop("implementation", None)
    for mine, exact in zip(got, ops_oracle.split_heads(*call, **options), strict=True):
        assert mine.dtype == rows.dtype and mine.shape == exact.shape
        np.testing.assert_allclose(
            np.asarray(mine, np.float64), exact, rtol=rtol, atol=ATOL
        )


@pytest.mark.parametrize(
    ("width", "options", "part"),
    [
        (16, {}, "need a multiple of 12"),
        (18, {}, "need a multiple of 12"),
        (16, {"theta": None}, "need a multiple of 6"),
        (24, {"groups": 0}, "groups 0; both must be at least 1"),
    ],
)
def test_rows_of_no_whole_heads_are_refused(width, options, part):
    zeros = jnp.zeros(4, jnp.int32)
    options = {"kv_heads": 2, "groups": 1, "theta": THETA} | options
    with pytest.raises(ConfigError, match=part):
        split_heads(jnp.zeros((4, width)), zeros, zeros, **options)
