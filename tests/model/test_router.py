"""Routers: gradients, gates, balance statistics, patches, bias updates."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compare import assert_close
from tests.model.tiny_models import VARIANTS, build, forward, tiny, tokens_like, union
from uoe_jax.config import UnionConfig
from uoe_jax.model import RouterBias, update_router_bias
from uoe_jax.model.attention import UnionAttention
from uoe_jax.model.baselines.moe import MoeMlp
from uoe_jax.model.context import make_context, patch_leaders
from uoe_jax.model.mlp import UnionMlp
from uoe_jax.model.routing.balance import router_stats
from uoe_jax.model.routing.token import (
    PatchRouter,
    gate_values,
    patch_scores,
    pick_scores,
)

LAYERS = {"attention": UnionAttention, "mlp": UnionMlp, "moe": MoeMlp}


def make_layer(part, gate, dtype):
    """A routed layer with clear choices, in a given precision, and its context."""
    config = union(union=UnionConfig(num_experts=4, top_k=2, gate=gate))
    layer = LAYERS[part](config, rngs=nnx.Rngs(jax.random.key(0)))
    layer = jax.tree.map(lambda a: a.astype(dtype), layer)
    weight = jax.random.normal(jax.random.key(1), layer.router.weight.shape)
    layer.router.weight[...] = weight.astype(dtype)
    return layer, make_context(config, (2, 5))


def loss_of(layer, context, x, probe):
    graphdef, state = nnx.split(layer)
    flat = nnx.to_flat_state(state)
    target = ("router", "weight")

    def loss(weight):
        new = [(p, v.replace(weight) if p == target else v) for p, v in flat]
        layer = nnx.merge(graphdef, nnx.from_flat_state(new))
        return jnp.sum(layer(x, context)[0] * probe)

    return loss


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("part", LAYERS)
def test_router_gradient_is_the_finite_difference(part, gate):
    with jax.enable_x64(True):
        layer, context = make_layer(part, gate, "float64")
        keys = jax.random.split(jax.random.key(2), 3)
        x = jax.random.normal(keys[0], (2, 5, 32), "float64")
        probe = jax.random.normal(keys[1], x.shape, "float64")
        loss = jax.jit(loss_of(layer, context, x, probe))
        weight = layer.router.weight[...]
        gradient = jax.grad(loss)(weight)
        for key in jax.random.split(keys[2], 3):
            direction = jax.random.normal(key, weight.shape, "float64")
            step = 1e-6
            high, low = loss(weight + step * direction), loss(weight - step * direction)
            slope = float((high - low) / (2 * step))
            # Central differences are exact to step**2; rounding adds 1e-16 / step.
            assert_close(slope, float(jnp.sum(gradient * direction)), 1e-6)
            assert abs(slope) > 1e-3


def test_straight_through_is_one_with_the_gradient_of_its_surrogate():
    layer, context = make_layer("mlp", "straight_through", "float32")
    keys = jax.random.split(jax.random.key(2), 2)
    x = jax.random.normal(keys[0], (2, 5, 32))
    probe = jax.random.normal(keys[1], x.shape)
    routing = layer.router(x, context)
    np.testing.assert_array_equal(routing.gates, jnp.ones((2, 5, 2)))
    weight = layer.router.weight[...]
    got = jax.grad(loss_of(layer, context, x, probe))(weight)
    # The surrogate: gates of 1 in the output, d gate = d 2 sigmoid(score).
    by_gate = jax.grad(
        lambda g: jnp.sum(layer.apply(x, routing._replace(gates=g)) * probe)
    )(routing.gates)
    scores = lambda w: pick_scores(jnp.einsum("btd,de->bte", x, w), routing.choices)
    _, pullback = jax.vjp(lambda w: 2 * jax.nn.sigmoid(scores(w)), weight)
    assert_close(got, pullback(by_gate)[0], 1e-4)
    assert np.abs(got).max() > 1e-2


def test_gate_values():
    scores = jnp.array([[0.0, 1.0, -1.0]])
    sigmoid = gate_values(scores, "sigmoid")
    assert_close(sigmoid, 2 / (1 + np.exp(-np.array(scores))), 1e-6)
    assert sigmoid[0, 0] == 1
    softmax = gate_values(scores, "softmax")
    assert_close(softmax, 3 * jax.nn.softmax(scores), 1e-6)
    np.testing.assert_array_equal(gate_values(scores, "straight_through"), [[1, 1, 1]])


def test_choices_are_the_highest_scores_and_the_bias_only_selects():
    router = PatchRouter(8, UnionConfig(), True, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(3), (2, 6, 8))
    context = make_context(tiny(), (2, 6))
    scores = np.asarray(router.scores(x))
    routing = router(x, context)
    expected = np.sort(np.argsort(-scores, axis=-1)[..., :4], axis=-1)
    np.testing.assert_array_equal(np.sort(routing.choices, axis=-1), expected)
    router.bias[...] = jnp.zeros(8).at[5].set(100.0)
    biased = router(x, context)
    assert np.all(np.any(np.asarray(biased.choices) == 5, axis=-1))
    gates = gate_values(pick_scores(router.scores(x), biased.choices), "sigmoid")
    np.testing.assert_array_equal(biased.gates, gates)


def test_statistics_by_hand():
    scores = jnp.log(jnp.array([[[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]]))
    choices = jnp.array([[[0, 1], [1, 0], [2, 0]]])
    segments = jnp.array([[1, 1, 0]])
    context = make_context(tiny(), (1, 3), segments=segments)
    stats = router_stats(scores, scores, choices, context)
    assert_close(stats["load"], [0.5, 0.5, 0.0], 1e-6)
    probs = np.array([0.4, 0.5, 0.1])
    expected = 3 * np.sum(np.array([0.5, 0.5, 0]) * probs)
    assert_close(stats["balance_loss"], expected, 1e-6)
    np.testing.assert_allclose(stats["z_loss"], 0, atol=1e-10)
    entropy = [-np.sum(p * np.log(p)) for p in ([0.7, 0.2, 0.1], [0.1, 0.8, 0.1])]
    assert_close(stats["entropy"], np.mean(entropy), 1e-5)
    shifted = router_stats(scores + 2, scores + 2, choices, context)
    assert_close(shifted["z_loss"], 4, 1e-5)


def test_patch_leaders_restart_at_each_document():
    leaders = patch_leaders((1, 8), None, 3)
    np.testing.assert_array_equal(leaders, [[0, 0, 0, 3, 3, 3, 6, 6]])
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0]])
    leaders = patch_leaders((1, 8), segments, 2)
    np.testing.assert_array_equal(leaders, [[0, 0, 2, 2, 4, 4, 6, 7]])


@pytest.mark.parametrize("patch_size", [5, 128])
def test_a_causal_patch_follows_its_first_token(patch_size):
    single = union(union=UnionConfig(num_experts=4, top_k=2), num_layers=1)
    patched = dataclasses.replace(
        single, union=dataclasses.replace(single.union, patch_size=patch_size)
    )
    tokens = tokens_like(single, 2, 12, seed=4)
    # The first layer's attention router sees the same input in both models.
    own = forward(build(single), tokens)[1]["attention"]["choices"][0]
    shared = forward(build(patched), tokens)[1]["attention"]["choices"][0]
    leaders = np.arange(12) // patch_size * patch_size
    np.testing.assert_array_equal(shared, np.asarray(own)[:, leaders])
    assert np.any(own[:, 1:] != shared[:, 1:])


def test_a_bidirectional_patch_follows_its_mean():
    scores = jax.random.normal(jax.random.key(5), (2, 6, 3))
    leaders = patch_leaders((2, 6), None, 4)
    mean = patch_scores(scores, leaders, causal=False)
    for begin, end in ((0, 4), (4, 6)):
        expected = np.asarray(scores)[:, begin:end].mean(1, keepdims=True)
        got = mean[:, begin:end]
        assert_close(got, np.broadcast_to(expected, got.shape), 1e-5)


def test_bias_update_moves_against_the_load_error():
    config = VARIANTS["mixed"]
    config = dataclasses.replace(
        config,
        union=dataclasses.replace(config.union, bias_update_rate=0.1),
        moe=dataclasses.replace(config.moe, bias_update_rate=0.2),
    )
    model = build(config)
    _, params, buffers = nnx.split(model, nnx.Param, ...)
    _, aux = forward(model, tokens_like(config, 2, 12, seed=6))
    update = jax.jit(update_router_bias, static_argnums=2)
    new = update(buffers, aux, config)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, buffers)
    flat = dict(nnx.to_flat_state(new))
    assert all(isinstance(variable, RouterBias) for variable in flat.values())
    # Layers: (dense, moe), (union, union), (dense, moe), stacked with period 2.
    cases = [
        (("mlp", 0), 0.2, aux["mlp"]["load"][np.array([0, 2])], 5),
        (("mlp", 1), 0.1, aux["mlp"]["load"][1:2, :4], 4),
        (("attention", 1), 0.1, aux["attention"]["load"], 4),
    ]
    assert len(flat) == len(cases)
    for (part, stack), rate, load, experts in cases:
        got = flat[("trunk", "blocks", stack, part, "router", "bias")][...]
        error = np.sign(1 / experts - np.asarray(load))
        assert_close(got, rate * error, 1e-6)


def test_bias_updates_balance_a_skewed_router():
    skewed = UnionConfig(num_experts=4, top_k=1, bias_update_rate=0.05)
    config = tiny(mlp=("union",), num_layers=1, union=skewed)
    model = build(config)
    graphdef, params, buffers = nnx.split(model, nnx.Param, ...)
    tokens = tokens_like(config, 4, 32, seed=7)

    @jax.jit
    def step(buffers):
        _, aux = nnx.merge(graphdef, params, buffers)(tokens)
        return update_router_bias(buffers, aux, config), aux["mlp"]["load"]

    buffers, before = step(buffers)
    for _ in range(60):
        buffers, after = step(buffers)
    assert np.max(after) - np.min(after) < 0.5 * (np.max(before) - np.min(before))
