"""Programs without what their kernels do keep everything around the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.extend import core

from uoe_jax.plan.aot import outlined


def double(x):
    def kernel(x_ref, out_ref):
        out_ref[...] = 2 * x_ref[...]

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


def program(x):
    """Kernels in a loop, in a branch and behind a checkpoint."""
    step = jax.checkpoint(lambda x: jnp.sin(double(x)))
    x = jax.lax.scan(lambda x, _: (step(x), None), x, length=3)[0]
    return jax.lax.cond(x[0] > 0, double, jnp.cos, x)


def equations(jaxpr):
    """Every equation's name, kernels with how many equations they have inside."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield "pallas_call", len(eqn.params["jaxpr"].eqns), eqn.outvars[0].aval
            continue
        yield eqn.primitive.name, 0, eqn.outvars[0].aval
        for inner in core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def test_only_the_bodies_of_kernels_are_left_out():
    jaxpr = jax.make_jaxpr(program)(jnp.ones(8))
    before, after = list(equations(jaxpr)), list(equations(outlined(jaxpr)))
    kernels = [count for name, count, _ in before if name == "pallas_call"]
    assert len(kernels) == 2 and all(kernels)
    assert after == [(name, 0, aval) for name, _, aval in before]


def test_a_program_without_kernels_computes_what_it_did():
    def plain(x):
        x = jax.lax.scan(lambda x, _: (jnp.sin(x), None), x, length=3)[0]
        return jax.lax.cond(x[0] > 0, jnp.exp, jnp.cos, x)

    x = jnp.linspace(-1, 1, 8)
    run = core.jaxpr_as_fun(outlined(jax.make_jaxpr(plain)(x)))
    np.testing.assert_array_equal(run(x)[0], plain(x))


def test_sorts_hold_the_same_arrays_and_only_reverse():
    x = jnp.arange(8.0).reshape(2, 4)
    jaxpr = jax.make_jaxpr(lambda x: jax.lax.sort((x, -x), dimension=1))(x)
    keys, values = core.jaxpr_as_fun(outlined(jaxpr))(x)
    np.testing.assert_array_equal(keys, x[:, ::-1])
    np.testing.assert_array_equal(values, -x[:, ::-1])
