"""No gradient runs from a token to a later one, and saturated routers stay finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compare import assert_close
from tests.model.router_kinds import LENGTH
from tests.model.tiny_models import build, tiny, tokens_like
from uoe_jax.config import UnionConfig, UnionOverrides
from uoe_jax.model.baselines.mod import DepthRouter
from uoe_jax.model.context import make_context

HIERARCHICAL = {"router": "hierarchical", "segment_size": 3, "selected": 3}
SELECTION = {"router": "selection", "segment_size": 3}
# Attention and MLP route differently, so that two models have all that is left to
# test: the leak checks' own models route tokens and patches.
PAIRS = {
    "hierarchical, then selection": (HIERARCHICAL, SELECTION),
    "shared keys, always on, capacity": (
        {"shared_kv": True},
        {"num_shared": 1, "capacity_factor": 0.75},
    ),
}


@jax.jit
def reach(model, tokens):
    """Largest gradient of output t by the embedding of token s, [T, T]."""
    context = make_context(model.config, tokens.shape, train=True)
    x = model.embed(tokens, context.positions)
    out, pullback = jax.vjp(lambda x: model.trunk(x, context)[0], x)
    weights = jax.random.normal(jax.random.key(7), out.shape)

    def by_token(t):
        seed = jnp.where((jnp.arange(LENGTH) == t)[None, :, None], weights, 0)
        return jnp.max(jnp.abs(pullback(seed)[0]), axis=(0, 2))

    return jax.lax.map(by_token, jnp.arange(LENGTH))


@pytest.mark.parametrize("name", PAIRS)
def test_no_gradient_runs_backwards_from_a_later_token(name):
    attention, mlp = PAIRS[name]
    config = tiny(
        num_layers=1,
        attention=("union",),
        mlp=("union",),
        union=UnionConfig(num_experts=4, top_k=2, **mlp),
        union_attention=UnionOverrides(**attention),
    )
    found = np.asarray(reach(build(config), tokens_like(config, 2, LENGTH, seed=8)))
    np.testing.assert_array_equal(np.triu(found, 1), 0)
    assert np.all(np.diag(found) > 1e-3)
    # The earlier tokens count, among them those that selections pool.
    assert np.all(found[1:, 0] > 1e-6)


def test_the_entropy_of_a_saturated_depth_router_is_finite():
    config = tiny(blocks=("mod",))
    scores = jnp.array([[-200.0, -30.0, -1.0, 0.0, 2.0, 40.0, 300.0]])
    asked = scores > 0
    context = make_context(config, scores.shape)
    router = DepthRouter(config, rngs=nnx.Rngs(0))
    found = [
        float(router.stats(scores[:, i : i + 1], asked[:, :1], asked[:, :1], context)
              ["entropy"])
        for i in range(scores.shape[1])
    ]  # fmt: skip
    prob = 1 / (1 + np.exp(-np.asarray(scores[0], np.float64)))
    wanted = [
        0.0 if p in (0, 1) else -p * np.log(p) - (1 - p) * np.log1p(-p) for p in prob
    ]
    assert_close(found, wanted, 1e-4)
