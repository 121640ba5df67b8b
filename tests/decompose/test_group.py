"""Which neurons form an expert, and the routers a cut starts from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compare import assert_close
from tests.decompose.test_exact import DENSE, draw
from uoe_jax.decompose.cut import Cut
from uoe_jax.decompose.group import (
    coactivation_order,
    order_neurons,
)
from uoe_jax.decompose.plan import as_written, make_plan
from uoe_jax.decompose.route import SCORE_DEVIATION, expert_lengths, fit_router
from uoe_jax.decompose.split import union_config
from uoe_jax.errors import ConfigError
from uoe_jax.model import with_params
from uoe_jax.model.observe import layer_values
from uoe_jax.runs.probe import logits


def test_neurons_that_are_active_together_are_grouped():
    rng = np.random.default_rng(0)
    topic = rng.integers(0, 4, 300)
    label = rng.permutation(np.repeat(np.arange(4), 8))
    active = (topic[:, None] == label[None]) * rng.uniform(0.8, 1.2, (300, 32))
    order = coactivation_order(active + rng.normal(0, 0.05, active.shape), 4)
    assert sorted(order) == list(range(32))
    assert all(len(set(label[part])) == 1 for part in np.split(order, 4))
    again = coactivation_order(active, 4, seed=1)
    assert all(len(set(label[part])) == 1 for part in np.split(again, 4))


def test_orders_depend_on_the_seed_only():
    assert order_neurons("contiguous", 4, 8).tolist() == list(range(8))
    first, same, other = (order_neurons("random", 4, 64, seed=s) for s in (1, 1, 2))
    assert (first == same).all() and (first != other).any()
    assert sorted(first) == list(range(64))
    with pytest.raises(ConfigError, match="calibration data"):
        order_neurons("coactivation", 4, 8)


def test_a_fitted_router_ranks_experts_as_their_outputs_do():
    rng = np.random.default_rng(1)
    x, mix = rng.normal(size=(400, 12)), rng.normal(size=(12, 5))
    shares = x @ mix + rng.normal(size=5) + 3
    fit = fit_router(x, shares)
    scores = x @ fit.weight + fit.bias
    assert fit.explained > 0.999
    assert (scores.argmax(axis=1) == shares.argmax(axis=1)).mean() > 0.98
    assert_close((x @ fit.weight).std(), SCORE_DEVIATION, 1e-6)
    # Nothing to learn from: finite, and no claim of an explanation.
    flat = fit_router(x, np.ones((400, 5)))
    assert np.isfinite(flat.weight).all() and flat.explained == 0


def test_lengths_are_those_of_each_experts_output():
    rng = np.random.default_rng(2)
    inner, weight = rng.normal(size=(7, 6)), rng.normal(size=(3, 2, 4))
    found = expert_lengths(inner, weight)
    for e in range(3):
        output = inner[:, 2 * e : 2 * e + 2] @ weight[e]
        assert_close(found[:, e], np.linalg.norm(output, axis=1), 1e-6)


@pytest.fixture(scope="module")
def dense():
    config = dataclasses.replace(DENSE, use_bias=False, activation="gelu")
    params = draw(config, 5)
    tokens = np.asarray(jax.random.randint(jax.random.key(2), (8, 12), 0, 48))
    segments = np.ones_like(tokens)
    segments[-1, 9:] = 0  # padding
    batch = {"tokens": tokens, "segments": segments}
    return config, params, batch, with_params(config, params)


def test_layer_values_add_up_to_the_models_hidden_state(dense):
    config, params, batch, model = dense
    valid = batch["segments"] != 0
    x = np.asarray(params["embed.embedding"])[batch["tokens"]][valid]
    for number, seen in enumerate(layer_values(model, batch)):
        at = lambda name, n=number: params[f"trunk.blocks.0.{name}"][n]
        heads = seen.heads.reshape(len(x), -1)
        x = x + heads @ at("attention.wo").reshape(-1, config.d_model)
        x = x + seen.neurons @ at("mlp.w_down")[0]
        assert len(seen.mlp_input) == valid.sum()
    tokens, segments = map(jnp.asarray, batch.values())
    hidden = np.asarray(model.hidden(tokens, segments=segments)[0])
    scale = params["trunk.norm.scale"]
    mean = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.norm_eps)
    np.testing.assert_allclose(x / mean * scale, hidden[valid], atol=1e-4)


def test_least_squares_routers_leave_out_less_than_the_last_experts(dense):
    config, _, batch, model = dense
    union = union_config(config, 4, 2)
    inputs = {k: jnp.asarray(v) for k, v in batch.items()}
    whole = np.asarray(logits(model, inputs | {"labels": 0}))
    error = {}
    for router in ("zero", "least_squares"):
        cut = Cut(num_experts=4, top_k=2, grouping="coactivation", router=router)
        plan = make_plan(model, union, cut, batch)
        params, biases = as_written(plan, union)
        cut = with_params(union, params, biases)
        away = np.asarray(logits(cut, inputs | {"labels": 0})) - whole
        error[router] = np.square(away[batch["segments"] != 0]).mean()
    assert len(plan.routers) == 4 and all(
        fit.explained > 0 for fit in plan.routers.values()
    )
    assert 0 < error["least_squares"] < error["zero"]
