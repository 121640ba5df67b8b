"""What SwiGLU keeps and refuses; its values are of tests/ops/suite.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import ops_oracle
from uoe_jax.errors import ConfigError
from uoe_jax.ops import swiglu

pytestmark = pytest.mark.both_jax


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
