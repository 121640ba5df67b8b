"""A step leaves every array of the state its shape and type, and is traced once."""

import dataclasses

import chex
import jax
import pytest

from tests.train.test_step import make_batch, optimizer_of
from tests.train.tiny_runs import make_tiny
from uoe_jax.config import MeshConfig
from uoe_jax.partition.mesh import make_mesh
from uoe_jax.runs.state import abstract_state, init_state
from uoe_jax.train.step import make_step, put_batch

CONFIGS = {
    "dense": make_tiny(),
    "union": make_tiny("union"),
    "mixture": make_tiny("moe", attention="dense"),
    "loss level": make_tiny(max_loss_jump=3.0),
}


def in_dtype(config, dtype):
    model = dataclasses.replace(config.model, param_dtype=dtype)
    return dataclasses.replace(config, model=model)


def traced_step(config, devices=1):
    """What one traced step makes of the state's shapes, and these."""
    mesh, optimizer = make_mesh(MeshConfig(data=devices)), optimizer_of(config)
    graphdef, state = abstract_state(config, optimizer, mesh)
    step = make_step(config, graphdef, optimizer, mesh)
    batch = jax.eval_shape(lambda: put_batch(make_batch(), mesh))
    return state, jax.eval_shape(step, state, batch)[0]


@pytest.mark.both_jax
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_keeps_shapes_and_types(name, dtype):
    before, after = traced_step(in_dtype(CONFIGS[name], dtype))
    chex.assert_trees_all_equal_structs(before, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    weights = {leaf.dtype.name for leaf in jax.tree.leaves(after.params)}
    assert dtype in weights


def test_a_state_that_changed_its_type_would_be_seen():
    before, after = traced_step(CONFIGS["dense"])
    wide = jax.ShapeDtypeStruct((), "float16")
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal_shapes_and_dtypes(
            before, dataclasses.replace(after, step=wide)
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_is_traced_once(dtype):
    """A type, a weak type or a place that moves would trace it again."""
    config = in_dtype(make_tiny("union", attention="dense"), dtype)
    mesh, optimizer = make_mesh(MeshConfig(data=2)), optimizer_of(config)
    graphdef, state = init_state(config, optimizer, mesh)
    made = make_step(config, graphdef, optimizer, mesh).__wrapped__
    chex.clear_trace_counter()  # counts by name: of other tests' steps too
    step = jax.jit(chex.assert_max_traces(made, n=1), donate_argnums=0)
    for seed in range(3):
        state, metrics = step(state, put_batch(make_batch(seed), mesh))
    assert int(state.step) == 3 and not metrics["bad_steps"]
