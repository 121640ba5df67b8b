"""Running the TPU kernels in the interpreter, and which of them a trace has."""

from __future__ import annotations

import jax
import jax.extend
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

from uoe_jax.ops import tpu


def interpreted(function, *args, detect_races=True, **tiles):
    """Values of `function` on memory that starts as NaN, and whether it had races."""
    jax.block_until_ready(args)
    with tpu.interpreted(detect_races=detect_races, **tiles):
        result = jax.block_until_ready(function(*args))
    return result, interpreter.races is not None and interpreter.races.races_found


def kernels(function, *args):
    """Names of the Pallas kernels in a function's trace."""

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "pallas_call":
                yield eqn.params["jaxpr"].debug_info.func_name
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                yield from walk(inner)

    return set(walk(jax.make_jaxpr(function)(*args).jaxpr))
