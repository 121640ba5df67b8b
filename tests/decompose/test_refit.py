"""Always-on experts and down-projections fitted to what is left on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.decompose.test_exact import DENSE, draw
from uoe_jax.config import UnionConfig
from uoe_jax.decompose.cut import Cut
from uoe_jax.decompose.plan import as_written, make_plan
from uoe_jax.decompose.refit import RIDGES, chosen_gates, core_first, fit_down
from uoe_jax.decompose.route import RouterFit
from uoe_jax.decompose.split import merge_params, union_config
from uoe_jax.errors import ConfigError
from uoe_jax.model import with_params
from uoe_jax.model.observe import Stream
from uoe_jax.runs.probe import logits

seeds = st.integers(0, 2**31)


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([1, 2, 3]), st.sampled_from([0.0, 0.01, 1.0]))
def test_the_fit_is_the_least_squares_solution(seed, top_k, ridge):
    """Against one lstsq in float64 over stacked rows: the data, then the ridge."""
    rng = np.random.default_rng(seed)
    neurons, w = rng.normal(size=(90, 12)), rng.normal(size=(12, 5))
    chosen = rng.random((90, 4)).argsort(axis=1) < top_k
    gates = chosen * rng.uniform(0.9, 1.1, (90, 4))
    wanted = neurons @ w + 0.1 * rng.normal(size=(90, 5))
    arrays = [a.astype(np.float32) for a in (neurons, gates, w, wanted)]
    found = fit_down(*arrays, ridge=max(ridge, 1e-9))
    on = neurons * np.repeat(gates, 3, axis=1)
    root = np.sqrt(ridge * np.trace(on.T @ on) / 12) * np.eye(12)
    rows, right = np.vstack([on, root]), np.vstack([wanted, root @ w])
    want = np.linalg.lstsq(rows, right)[0]
    assert np.abs(found.w_down - want).max() < 1e-4 * max(1, np.abs(want).max())
    assert np.abs(found.outputs - on @ want).max() < 1e-3
    assert found.after <= found.before + 1e-6


@settings(max_examples=10, deadline=None)
@given(seeds, st.sampled_from([0.01, 3.0]))
def test_the_ridge_is_that_of_the_least_error_on_the_last_quarter(seed, noise):
    """Against lstsq in float64 for each ridge, fitted to the first three quarters."""
    rng = np.random.default_rng(seed)
    neurons, w = rng.normal(size=(40, 12)), rng.normal(size=(12, 5))
    gates = np.ones((40, 4))
    wanted = neurons @ (w + 0.3 * rng.normal(size=w.shape))
    wanted += noise * rng.normal(size=wanted.shape)
    errors = []
    for ridge in RIDGES:
        on = neurons[:30]
        root = np.sqrt(ridge * np.trace(on.T @ on) / 12) * np.eye(12)
        rows, right = np.vstack([on, root]), np.vstack([wanted[:30], root @ w])
        fit = np.linalg.lstsq(rows, right)[0]
        errors.append(np.square(neurons[30:] @ fit - wanted[30:]).sum())
    arrays = [a.astype(np.float32) for a in (neurons, gates, w, wanted)]
    found = errors[RIDGES.index(fit_down(*arrays).ridge)]
    assert found <= min(errors) + 1e-4 * np.square(wanted[30:]).sum()


def test_neurons_that_are_never_on_keep_their_weights():
    rng = np.random.default_rng(3)
    neurons, w = rng.normal(size=(50, 6)), rng.normal(size=(6, 4))
    gates = np.repeat([[1.0, 0.0]], 50, axis=0)
    arrays = [a.astype(np.float32) for a in (neurons, gates, w, neurons @ w)]
    found = fit_down(*arrays)
    assert np.abs(found.w_down[3:] - w[3:]).max() < 1e-6
    assert np.abs(found.w_down[:3] - w[:3]).max() > 1e-3
    nothing = fit_down(arrays[0], np.zeros((50, 2), np.float32), *arrays[2:])
    assert (nothing.w_down == arrays[2]).all() and not nothing.outputs.any()


def test_gates_are_those_of_the_best_scores():
    union = UnionConfig(num_experts=5, top_k=3, num_shared=1)
    x = np.asarray([[1.0, 0.0], [0.0, 1.0]], np.float32)
    weight = np.asarray([[0.3, 0.2, 0.1, 0.0], [0.0, 0.1, 0.2, 0.3]], np.float32)
    bias = np.asarray([0.0, 0.0, 0.0, 1.0], np.float32)  # decides, and isn't a gate
    gates = np.asarray(chosen_gates(x, RouterFit(weight, bias, 1.0), union))
    value = lambda score: 2 / (1 + np.exp(-score))
    want = [[1, value(0.3), 0, 0, value(0.0)], [1, 0, 0, value(0.2), value(0.3)]]
    assert np.abs(gates - want).max() < 1e-6
    first = np.asarray(chosen_gates(x, None, union))
    assert (first == [[1, 1, 1, 0, 0]] * 2).all()


def test_the_core_writes_most():
    written = np.asarray([[0.0, 3, 1, 2], [0, 3, 1.5, 0]])
    assert core_first(written, 2).tolist() == [False, True, False, True]
    assert core_first(np.ones((2, 4)), 2).tolist() == [True, True, False, False]


@pytest.fixture(scope="module")
def dense():
    config = dataclasses.replace(DENSE, d_ff=48)
    params = draw(config, 11)
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (40, 16), 0, 48))
    segments = np.ones_like(tokens)
    segments[-1, 9:] = 0  # padding
    batch = {"tokens": tokens, "segments": segments}
    return config, params, batch, with_params(config, params)


def cut_logits(dense, **changes):
    """What a cut model says, its plan, and how far the dense model says otherwise."""
    config, _, batch, model = dense
    parts = changes.pop("parts", ("mlp",))
    cut = Cut(num_experts=8, top_k=4, parts=parts, **changes)
    union = union_config(config, 8, 4, parts, 4, cut.shared)
    plan = make_plan(model, union, cut, batch)
    params, biases = as_written(plan, union)
    inputs = {k: jnp.asarray(v) for k, v in batch.items()} | {"labels": 0}
    found = np.asarray(logits(with_params(union, params, biases), inputs))
    away = (found - np.asarray(logits(model, inputs)))[batch["segments"] != 0]
    return union, plan, params, biases, float(np.sqrt(np.square(away).mean()))


@pytest.mark.parametrize("shared", [0, 2])
def test_refitted_layers_write_what_the_union_computes(dense, shared):
    """The calibration's stream is the union model's hidden state, layer by layer."""
    config, _, batch, model = dense
    union, plan, params, biases, _ = cut_logits(dense, shared=shared, refit=True)
    stream = Stream(model, batch)
    for number, fit in plan.refits.items():
        last = stream.run_layer()
        bias = params["trunk.blocks.0.mlp.b_down"][number]
        router, mlp = plan.routers[number, "mlp"], union.union_for("mlp")
        gates = np.asarray(chosen_gates(last.mlp_input, router, mlp))
        gates = np.repeat(gates, 6, axis=1)
        neurons = np.asarray(last.neurons)[:, plan.order[number]]
        outputs = (neurons * gates) @ np.asarray(fit.w_down)
        stream.replace_output(outputs + bias)
    x = np.asarray(last.residual) + np.asarray(outputs) + bias
    found = with_params(union, params, biases)
    tokens, segments = jnp.asarray(batch["tokens"]), jnp.asarray(batch["segments"])
    hidden = np.asarray(found.hidden(tokens, segments=segments)[0])
    hidden = hidden[batch["segments"] != 0]
    mean = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.norm_eps)
    want = x / mean * params["trunk.norm.scale"]
    assert np.abs(hidden - want).max() < 1e-3 * np.abs(want).max()


def test_a_core_and_a_refit_leave_out_less(dense):
    plain = cut_logits(dense)[-1]
    core = cut_logits(dense, shared=2)[-1]
    refit = cut_logits(dense, refit=True)[-1]
    both = cut_logits(dense, shared=2, refit=True)[-1]
    assert core < plain and refit < 0.9 * plain and both < min(core, refit)


def test_refits_beside_routed_heads_are_fitted_on_the_dense_models_values(dense):
    parts = ("attention", "mlp")
    plain, refit = (cut_logits(dense, parts=parts, refit=r) for r in (False, True))
    for fit in refit[1].refits.values():
        assert fit.after < fit.before
    assert refit[0].union_for("attention").num_shared == 0
    assert np.isfinite([plain[-1], refit[-1]]).all()


def test_shared_experts_hold_the_neurons_that_write_most_and_come_back(dense):
    config, params, batch, model = dense
    union, plan, _, _, _ = cut_logits(dense, shared=2, grouping="random")
    stream = Stream(model, batch)
    for number in range(config.num_layers):
        seen = stream.run_layer()
        w_down = params["trunk.blocks.0.mlp.w_down"][number, 0]
        length = np.linalg.norm(w_down, axis=1)
        written = np.square(seen.neurons).mean(axis=0) * np.square(length)
        core, rest = plan.order[number][:12], plan.order[number][12:]
        assert written[core].min() >= written[rest].max()
    back = merge_params(plan.params, union, config, plan.order)
    assert all((back[name] == params[name]).all() for name in params)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parts": ("attention",), "refit": True}, "refit is about the MLP's"),
        ({"parts": ("attention",), "shared": 1}, "shared is about the MLP's"),
        ({"shared": 4}, "shared is 4; .* use 0 to 3"),
        ({"top_k": 8, "refit": True}, "a token uses all 8"),
    ],
)
def test_wishes_that_contradict_each_other(changes, says):
    cut = Cut(**{"num_experts": 8, "top_k": 4, **changes})
    with pytest.raises(ConfigError, match=says):
        cut.check()
