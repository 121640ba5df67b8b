"""SwiGLU of rows times their factors and its gradients, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops import ops_oracle
from uoe_jax.errors import ConfigError
from uoe_jax.ops import swiglu

pytestmark = pytest.mark.both_jax

# float32's error in products of a few numbers and sums of them, of the largest.
TOLERANCE = 2.0**-20


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 5), width=st.integers(1, 3))
def test_value_and_gradients_match_float64(seed, count, width):
    check(ops_oracle.draw_swiglu(seed, count, width))


def check(call, rtol=0.0, tolerance=TOLERANCE, **options):
    """The value and gradients of a call are the oracle's: the rows' to `rtol`."""

    @jax.jit
    def run(rows, factors, grad):
        out, vjp = jax.vjp(lambda *args: swiglu(*args, **options), rows, factors)
        return out, *vjp(grad)

    rows, factors, grad = map(jnp.asarray, call)
    got, want = run(rows, factors, grad), ops_oracle.swiglu(*call)
    unscaled = ops_oracle.swiglu(call[0], np.ones(len(rows)), call[2])[0]
    # Sums may cancel: their error is that of the terms, in float32 or wider.
    terms = np.abs(unscaled * np.asarray(call[2], np.float64)).sum(axis=1)
    for mine, exact, like, size, relative in zip(
        *(got, want, (rows, rows, factors), (*want[:2], terms), (rtol, rtol, 0)),
        strict=True,
    ):
        assert mine.dtype == like.dtype and mine.shape == exact.shape
        bound = tolerance * max(1.0, np.abs(size).max())
        np.testing.assert_allclose(
            np.asarray(mine, np.float64), exact, rtol=relative, atol=bound
        )


def test_bfloat16_is_rounded_once():
    """Half a step of 8 bits, whatever the value's size, beside float32's error."""
    check(ops_oracle.draw_swiglu(None, 40, 24, jnp.bfloat16), rtol=2.0**-8)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        check(ops_oracle.draw_swiglu(None, 7, 5, np.float64), tolerance=2.0**-48)


def test_factors_of_another_dtype_get_their_gradient_in_it():
    rows, factors, grad = ops_oracle.draw_swiglu(None, 6, 4)
    factors = jnp.asarray(factors, jnp.bfloat16)
    _, vjp = jax.vjp(swiglu, jnp.asarray(rows), factors)
    got = vjp(jnp.asarray(grad))[1]
    want = ops_oracle.swiglu(rows, factors, grad)[2]
    assert got.dtype == jnp.bfloat16
    got = np.asarray(got, np.float64)
    np.testing.assert_allclose(got, want, rtol=2.0**-8, atol=1e-4)


def test_no_activations_are_kept_for_the_gradient():
    rows, factors = jnp.ones((6, 8)), jnp.ones(6)
    _, vjp = jax.vjp(swiglu, rows, factors)
    kept = {leaf.shape for leaf in jax.tree.leaves(vjp)}
    assert kept == {(6, 8), (6,)}


@pytest.mark.parametrize(
    ("width", "count", "part"),
    [
        (7, 4, "rows are 7 wide; up and gate side by side need an even width"),
        (8, 3, "3 factors for 4 rows; each row needs one"),
    ],
)
def test_rows_that_do_not_fit_are_refused(width, count, part):
    with pytest.raises(ConfigError, match=part) as caught:
        swiglu(jnp.zeros((4, width)), jnp.zeros(count))
    assert "\n" not in str(caught.value)
