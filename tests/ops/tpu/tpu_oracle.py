"""Running the TPU kernels in the interpreter, and float64 answers to hold them to."""

from __future__ import annotations

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

from uoe_jax.ops import tpu


def interpreted(function, *args, detect_races=True, **tiles):
    """Values of `function` on memory that starts as NaN, and whether it had races."""
    jax.block_until_ready(args)
    with tpu.interpreted(detect_races=detect_races, **tiles):
        result = jax.block_until_ready(function(*args))
    return result, interpreter.races is not None and interpreter.races.races_found


def in_float64(function, *args):
    """Values of a plain JAX function of the same arrays, in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda a: (
                jnp.asarray(np.asarray(a, np.float64))
                if jnp.issubdtype(a.dtype, jnp.floating)
                else jnp.asarray(a)
            ),
            args,
        )
        return [np.asarray(x) for x in function(*wide)]


def assert_close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        scale = max(1.0, float(np.abs(b).max(initial=0)))
        np.testing.assert_allclose(
            np.asarray(a, np.float64) / scale, b / scale, rtol=0, atol=tolerance
        )


def kernels(function, *args):
    """Names of the Pallas kernels in a function's trace."""

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "pallas_call":
                yield eqn.params["jaxpr"].debug_info.func_name
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                yield from walk(inner)

    return set(walk(jax.make_jaxpr(function)(*args).jaxpr))
