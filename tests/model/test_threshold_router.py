"""Threshold routing: moving thresholds, balance without a loss, any number of picks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compare import assert_close
from tests.model.tiny_models import (
    assert_is_dense_when_cut,
    build,
    forward,
    tiny,
    tokens_like,
)
from uoe_jax.config import MoeConfig, UnionConfig, UnionOverrides
from uoe_jax.errors import ConfigError
from uoe_jax.hardware.count import cache_bytes
from uoe_jax.model import init_cache, update_router_bias
from uoe_jax.model.context import make_context
from uoe_jax.model.routing.balance import router_losses
from uoe_jax.model.routing.threshold import ThresholdRouter
from uoe_jax.train.stages import with_more_experts
from uoe_jax.validation import validate_model

UNION = {"attention": ("union",), "mlp": ("union",)}


def thresholds(**options):
    options = {"num_experts": 4, "top_k": 2, **options}
    return UnionConfig(router="threshold", **options)


def made(**options):
    router = ThresholdRouter(8, thresholds(**options), True, rngs=nnx.Rngs(0))
    draw = np.random.default_rng(1)
    router.weight[...] = jnp.asarray(draw.normal(size=router.weight.shape), jnp.float32)
    return router, jnp.asarray(draw.normal(size=(3, 20, 8)), jnp.float32)


@pytest.mark.parametrize("shared", [0, 1])
def test_an_expert_takes_what_is_over_its_threshold_up_to_the_most(shared):
    router, x = made(num_experts=5, top_k=3, most_picks=4, num_shared=shared)
    router.bias[...] = jnp.linspace(-1.0, 1.0, 5 - shared)
    routing = router(x, make_context(tiny(), (3, 20)))
    over = np.asarray(router.scores(x) + router.bias[...][None, None])
    assert routing.choices.shape == (3, 20, 4)
    for place in np.ndindex(3, 20):
        best = [e for e in np.argsort(-over[place]) if over[place][e] > 0]
        best = best[: 4 - shared]
        kept = np.asarray(routing.kept[place])
        found = np.asarray(routing.choices[place])[kept]
        np.testing.assert_array_equal(found, [*range(shared), *(np.add(best, shared))])
        gates = 2 / (1 + np.exp(-over[place][best]))
        gates = np.concatenate([np.ones(shared), gates])
        np.testing.assert_allclose(routing.gates[place][kept], gates, atol=1e-5)
        assert not np.any(np.asarray(routing.gates[place])[~kept])


def test_a_relu_gate_is_nothing_where_an_expert_comes_in():
    router, x = made(gate="relu", most_picks=4)
    over = np.asarray(router.scores(x))
    routing = router(x, make_context(tiny(), (3, 20)))
    wanted = 4 * np.maximum(
        np.take_along_axis(over, np.asarray(routing.choices), -1), 0
    )
    np.testing.assert_allclose(routing.gates, wanted, atol=1e-5)


def test_thresholds_follow_the_quantile_beside_other_routers():
    """Layers: (union, moe), (union, union) and so on, of unlike numbers of experts."""
    config = tiny(
        num_layers=4,
        attention=("union",),
        mlp=("moe", "union"),
        moe=MoeConfig(num_experts=5, top_k=2, bias_update_rate=0.3, d_expert=16),
        union=thresholds(top_k=1, threshold_rate=0.25),
        union_attention=UnionOverrides(router="token"),
    )
    model = build(config)
    _, _, buffers = nnx.split(model, nnx.Param, ...)
    moved = jax.tree.map(lambda a: a + 0.5, buffers)
    tokens = tokens_like(config, 4, 12, seed=6)
    segments = jnp.array([[1] * 12, [1] * 6 + [2] * 6, [1] * 9 + [0] * 3, [1] * 12])
    _, aux = forward(model, tokens, segments=segments)
    new = dict(nnx.to_flat_state(update_router_bias(moved, aux, config)))
    wanted = np.asarray(aux["mlp"]["threshold"])[[1, 3], :4]
    got = new[("trunk", "blocks", 1, "mlp", "router", "bias")][...]
    np.testing.assert_allclose(got, 0.5 + 0.25 * (-wanted - 0.5), atol=1e-5)
    load = np.asarray(aux["mlp"]["load"])[[0, 2]]
    got = new[("trunk", "blocks", 0, "mlp", "router", "bias")][...]
    np.testing.assert_allclose(got, 0.5 + 0.3 * np.sign(0.2 - load), atol=1e-5)
    assert not np.any(np.asarray(aux["mlp"]["threshold"])[[0, 2]])
    # An expert's share of the 45 tokens that aren't padding exceed its threshold.
    router, x = made(top_k=1)
    x = jnp.concatenate([x, x])[:4, :12]
    scores = np.asarray(router.scores(x))[np.asarray(segments) > 0]
    found = router(x, make_context(config, (4, 12), segments=segments)).stats
    over = (scores > np.asarray(found["threshold"])[None]).sum(0)
    np.testing.assert_array_equal(over, 45 - np.floor(0.75 * 45))


def test_thresholds_balance_a_skewed_router_without_a_loss():
    config = tiny(mlp=("union",), num_layers=1, union=thresholds(top_k=1))
    model = build(config)
    graphdef, params, buffers = nnx.split(model, nnx.Param, ...)
    tokens = tokens_like(config, 8, 32, seed=7)

    @jax.jit
    def step(buffers):
        _, aux = nnx.merge(graphdef, params, buffers)(tokens, collect_choices=True)
        kept = aux["mlp"]["choices"] >= 0
        return update_router_bias(buffers, aux, config), aux["mlp"]["load"], kept

    buffers, before, _ = step(buffers)
    for _ in range(60):
        buffers, after, kept = step(buffers)
    assert np.abs(after - 0.25).max() < 0.05 < np.abs(before - 0.25).max()
    # As many picks as tokens, but for those that `most_picks` leaves out.
    assert 0.8 < float(kept.sum()) / 256 <= 1.02
    _, aux = forward(model, tokens)
    weighty = dataclasses.replace(config.union, balance_loss=7.0, router_z_loss=0.0)
    config = dataclasses.replace(config, union=weighty)
    pushed = jax.grad(
        lambda s: router_losses({"mlp": {**aux["mlp"], "load": s}}, config)
    )
    np.testing.assert_array_equal(pushed(aux["mlp"]["load"]), 0)


def test_all_experts_with_unit_gates_are_the_dense_model():
    assert_is_dense_when_cut(tiny(**UNION, union=thresholds(top_k=4)))


def test_a_token_that_passes_nothing_is_only_passed_on():
    config = tiny(mlp=("union",), num_layers=1, union=thresholds())
    block = jax.tree.map(lambda a: a[0], build(config).trunk.blocks[0])
    block.mlp.router.bias[...] = jnp.full(4, -1e3)
    x = jax.random.normal(jax.random.key(0), (2, 5, 32))
    y, stats = block.mlp(x, make_context(config, (2, 5)))
    np.testing.assert_array_equal(y, 0)
    assert_close(stats["load"], np.zeros(4), 1e-6)


def test_a_cache_has_room_for_the_most_picks_and_a_warmup_for_its_experts():
    config = tiny(**UNION, union=thresholds(top_k=1, most_picks=3))
    cache = init_cache(config, 2, 12)
    assert cache.layers[0]["experts"].shape == (2, 2, 36)
    keys = sum(entry[name].nbytes for entry in cache.layers for name in "kv")
    assert cache_bytes(config, 2, 12) == keys
    assert with_more_experts(config, 0).union.most == 4
    assert with_more_experts(config, 4).union.most == 3


@pytest.mark.parametrize(
    ("union", "problem"),
    [
        (thresholds(gate="softmax"), "gate is 'softmax' and with router 'threshold'"),
        (thresholds(most_picks=1), "most_picks is 1.*use 2 to 4"),
        (thresholds(most_picks=5), "most_picks is 5.*use 2 to 4"),
        (UnionConfig(num_experts=4, gate="relu"), "relu is for router threshold"),
        (UnionConfig(num_experts=4, most_picks=4), "it is for router threshold, use 0"),
    ],
)
def test_thresholds_that_cannot_be_are_one_line(union, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        validate_model(tiny(**UNION, union=union))
    assert "\n" not in str(caught.value)
