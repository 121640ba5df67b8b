"""Products by bfloat16 pieces have the precision of float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.compare import assert_close
from uoe_jax.model.routing.token import router_scores
from uoe_jax.ops.split_matmul import split, split_matmul

pytestmark = pytest.mark.both_jax

ROWS, WIDTH, EXPERTS = 40, 24, 5
EPS = float(jnp.finfo(jnp.float32).eps)


def draw_arrays(seed):
    draw = np.random.default_rng(seed)
    scale = lambda *shape: 10.0 ** draw.uniform(-4, 4, shape)
    normal = lambda *shape: draw.normal(size=shape)
    x = jnp.asarray(normal(2, ROWS // 2, WIDTH) * scale(2, 1, 1), jnp.bfloat16)
    w = jnp.asarray(normal(WIDTH, EXPERTS) * scale(1, EXPERTS), jnp.float32)
    grad = jnp.asarray(normal(2, ROWS // 2, EXPERTS) * scale(1, 1, 1), jnp.float32)
    return x, w, grad


@jax.jit
def value_and_gradients(x, w, grad):
    out, vjp = jax.vjp(split_matmul, x, w)
    return out, *vjp(grad)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_value_and_gradients_match_float64(seed):
    x, w, grad = draw_arrays(seed)
    out, dx, dw = value_and_gradients(x, w, grad)
    x, w, grad = (np.asarray(a, np.float64) for a in (x, w, grad))
    flat = lambda a: a.reshape(-1, a.shape[-1])
    # Each within some roundings of the sum of its terms' sizes.
    for got, a, b in ((out, x, w), (dw, flat(x).T, flat(grad))):
        assert got.dtype == jnp.float32
        assert np.all(np.abs(got - a @ b) <= 8 * EPS * (np.abs(a) @ np.abs(b)))
    assert dx.dtype == jnp.bfloat16
    exact, size = grad @ w.T, np.abs(grad) @ np.abs(w).T
    half_step = 2.0**-8 * np.abs(exact)  # of rounding to 8 bits
    assert np.all(
        np.abs(np.asarray(dx, np.float64) - exact) <= half_step + size / 2**14
    )


@settings(max_examples=50, deadline=None)
@given(st.floats(2.0**-100, 2.0**100, width=32), st.booleans())
def test_three_pieces_are_the_number(x, negative):
    x = jnp.float32(-x if negative else x)
    pieces = jax.jit(split)(x)
    assert sum(float(p) for p in pieces) == float(x)
    assert float(pieces[0]) == float(x.astype(jnp.bfloat16))


def test_routers_take_it_for_bfloat16():
    x, w, _ = draw_arrays(0)
    program = str(jax.make_jaxpr(router_scores)(x, w))
    assert "custom_vjp" in program and "HIGHEST" not in program
    wide = str(jax.make_jaxpr(router_scores)(x.astype(jnp.float32), w))
    assert "custom_vjp" not in wide and "HIGHEST" in wide


def test_a_sharded_batch_adds_up_the_weights_gradient():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x, w, grad = draw_arrays(3)
    x, grad = (jnp.concatenate([a] * 4) for a in (x, grad))
    whole = value_and_gradients(x, w, grad)

    def loss(x, w, grad):
        out = split_matmul(x, w)
        return jax.lax.psum(jnp.sum(out * grad), "data")

    sharded = jax.shard_map(
        loss, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P()
    )
    dx, dw = jax.jit(jax.grad(sharded, (0, 1)))(x, w, grad)
    assert_close(dw, whole[2], 2e-5)
    np.testing.assert_array_equal(dx, whole[1])
