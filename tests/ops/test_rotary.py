"""Rotary positions are products of complex numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.ops.rotary import rotate

pytestmark = pytest.mark.both_jax

ROWS, HEADS, WIDTH, THETA = 6, 2, 8, 100.0


@jax.jit
def value_and_gradient(x, positions, grad):
    out, vjp = jax.vjp(lambda x: rotate(x, positions, THETA), x)
    return out, vjp(grad)[0]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_value_and_gradient_match_float64(seed):
    draw = np.random.default_rng(seed)
    x, grad = draw.normal(size=(2, ROWS, HEADS, WIDTH)).astype(np.float32)
    positions = draw.integers(0, 2000, ROWS).astype(np.int32)
    got = value_and_gradient(x, positions, grad)
    turn = THETA ** (-np.arange(WIDTH // 2) / (WIDTH // 2))
    turn = np.exp(1j * positions[:, None, None] * turn)
    for mine, a, by in zip(got, (x, grad), (turn, turn.conj()), strict=True):
        a = a[..., : WIDTH // 2] + 1j * a[..., WIDTH // 2 :]
        want = np.concatenate([(a * by).real, (a * by).imag], axis=-1)
        # Angles up to 2000 radians in float32.
        np.testing.assert_allclose(mine, want, atol=2e-3)


def test_the_backward_pass_makes_its_own_sines():
    """Found in the forward pass and kept, they are several times the rows' bytes.

    On GPUs XLA knew that cos(-x) is cos(x): the angles must depend on the gradient.
    """
    x, positions = jnp.ones((4, 2, 16)), jnp.ones(4, jnp.int32)
    run = lambda x, grad: jax.vjp(lambda x: rotate(x, positions, THETA), x)[1](grad)
    program = jax.make_jaxpr(run)(x, x).jaxpr
    names = [eqn.primitive.name for eqn in program.eqns]
    assert names.index("optimization_barrier") < len(names) - 1 - names[::-1].index(
        "cos"
    )
