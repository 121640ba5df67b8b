"""Capacity beside always-on experts, and beside a router of attention without one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.compare import assert_close
from tests.model.router_kinds import LENGTH, config_of
from uoe_jax.config import ExperimentConfig, UnionConfig, UnionOverrides
from uoe_jax.model.context import make_context
from uoe_jax.model.routing import make_router
from uoe_jax.validation import find_problems


def test_always_on_experts_lose_no_token_to_a_capacity():
    union = UnionConfig(
        num_experts=4, top_k=3, num_shared=2, capacity_factor=0.5, router_init_std=1.0
    )
    router = make_router(32, union, True, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, 32))
    context = make_context(
        config_of("decoder", "token"), x.shape[:2], train=True, collect_choices=True
    )
    routing = jax.jit(lambda x: router(x, context))(x)
    kept = np.asarray(routing.kept)
    assert kept[..., :2].all() and not kept[..., 2].all()
    np.testing.assert_array_equal(
        routing.stats["choices"], np.where(kept, routing.choices, -1)
    )
    # One of two routed experts a token: there is room for 0.5 * T / 2 in each.
    held = [(routing.choices[..., 2] == e) & kept[..., 2] for e in (2, 3)]
    assert all(np.all(jnp.sum(h, axis=1) <= LENGTH // 4) for h in held)
    lost = 1 - kept[..., 2].mean()
    assert_close(routing.stats["dropped"], lost, 1e-6)


def test_a_capacity_of_the_mlp_leaves_attentions_own_router_free():
    def problems(own):
        model = dataclasses.replace(
            config_of("decoder", "token"),
            vocab_size=256,
            union=UnionConfig(num_experts=4, top_k=2, capacity_factor=1.0),
            union_attention=own,
        )
        factors = [model.union_for(p).capacity_factor for p in ("attention", "mlp")]
        return factors, list(find_problems(ExperimentConfig(model=model)))

    selection = UnionOverrides(router="selection", segment_size=4)
    assert problems(selection) == ([None, 1.0], [])
    assert problems(UnionOverrides(patch_size=2)) == ([1.0, 1.0], [])
