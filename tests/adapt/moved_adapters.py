"""Adapters and models of plain random numbers: traced for shapes, never compiled."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uoe_jax.adapt import Adapters, init_adapters
from uoe_jax.adapt.plan import leaf_scale
from uoe_jax.model import make_model


def move_adapters(params, config, seed=0, **options):
    """An adapter with no factor zero, so that every part of a delta counts."""
    plans = []

    def trace():
        fresh = init_adapters(params, config, jax.random.key(0), **options)
        plans.extend(fresh.plans)
        return fresh.weights, fresh.anchor

    shapes = jax.eval_shape(trace)
    rng = np.random.default_rng(seed)
    draw = lambda a: jnp.asarray(0.7 * rng.normal(size=a.shape), a.dtype)
    weights, anchor = jax.tree.map(draw, shapes)
    scales = {p.name: jnp.float32(leaf_scale(p, config)) for p in plans}
    return Adapters(weights=weights, scales=scales, anchor=anchor, plans=tuple(plans))


def draw_model(config):
    """A model's graphdef, parameters and buffers; norms and routers' biases plain."""
    model = jax.eval_shape(lambda: make_model(config, jax.random.key(0)))
    graphdef, params, buffers = nnx.split(model, nnx.Param, ...)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if "scale" in jax.tree_util.keystr(path):
            return jnp.ones(leaf.shape, leaf.dtype)
        return jnp.asarray(0.25 * rng.normal(size=leaf.shape), leaf.dtype)

    params = jax.tree_util.tree_map_with_path(draw, params)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), buffers)
    return graphdef, params, zeros
