"""Which neurons form an expert, and the routers a cut starts from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compare import assert_close
from tests.decompose.test_exact import DENSE, draw
from uoe_jax.decompose.cut import Cut
from uoe_jax.decompose.group import GROUPINGS, GROUPS, Neurons, order_neurons
from uoe_jax.decompose.plan import as_written, make_plan
from uoe_jax.decompose.route import (
    SCORE_DEVIATION,
    cluster_router,
    expert_lengths,
    fit_router,
)
from uoe_jax.decompose.split import union_config
from uoe_jax.errors import ConfigError
from uoe_jax.model import with_params
from uoe_jax.model.observe import layer_values
from uoe_jax.runs.probe import logits


@pytest.mark.parametrize("grouping", ["weights", "coactivation", "spectral", "mlc"])
def test_neurons_that_belong_together_are_grouped(grouping):
    rng = np.random.default_rng(0)
    topic = rng.integers(0, 4, 300)
    label = rng.permutation(np.repeat(np.arange(4), 32))
    active = (topic[:, None] == label[None]) * rng.uniform(0.8, 1.2, (300, 128))
    # Neurons of a topic read alike too.
    w_in = rng.normal(size=(8, 4))[:, label] + rng.normal(0, 0.05, (8, 128))
    neurons = Neurons(128, active + rng.normal(0, 0.05, active.shape), w_in)
    order = order_neurons(grouping, 4, neurons)
    assert sorted(order) == list(range(128))
    assert all(len(set(label[part])) == 1 for part in np.split(order, 4))
    if grouping != "mlc":  # which would train another network
        again = order_neurons(grouping, 4, Neurons(128, active, w_in), seed=1)
        assert all(len(set(label[part])) == 1 for part in np.split(again, 4))


def test_orders_depend_on_the_seed_only():
    order = lambda grouping, seed=0: order_neurons(grouping, 4, Neurons(64), seed=seed)
    assert order("contiguous").tolist() == list(range(64))
    first, same, other = (order("random", seed) for seed in (1, 1, 2))
    assert (first == same).all() and (first != other).any()
    assert sorted(first) == list(range(64))


def test_a_grouping_without_what_it_looks_at_is_refused():
    assert tuple(GROUPS) == GROUPINGS
    for grouping in ("coactivation", "spectral", "mlc"):
        with pytest.raises(ConfigError, match="calibration data"):
            order_neurons(grouping, 4, Neurons(8))
    with pytest.raises(ConfigError, match="input weights"):
        order_neurons("weights", 4, Neurons(8))


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


def test_clusters_of_inputs_point_experts_to_where_they_write_most():
    rng = np.random.default_rng(3)
    kind = rng.integers(0, 4, 600)
    x = 3 * np.eye(6)[kind] + rng.normal(0, 0.2, (600, 6)) + 5
    expert = np.array([2, 0, 3, 1])  # of each kind
    shares = 1.0 + 2 * (np.arange(4)[None] == expert[kind][:, None])
    fit = cluster_router(x, shares)
    decided = x @ fit.weight + fit.bias
    assert (decided.argmax(axis=1) == expert[kind]).all() and fit.explained > 0.8
    assert_close(decided.std(), SCORE_DEVIATION, 1e-6)
    # As few different inputs as that have no clusters: finite, nothing claimed.
    flat = cluster_router(np.ones((5, 6)), shares[:5])
    assert np.isfinite(flat.weight).all() and flat.explained == 0
