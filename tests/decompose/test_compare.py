"""Groupings side by side, and the number of experts that PPP finds."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.compare import assert_close
from tests.decompose.test_exact import DENSE, draw
from uoe_jax.config import ExperimentConfig, MeshConfig
from uoe_jax.decompose import compare
from uoe_jax.decompose.compare import compare_groupings
from uoe_jax.decompose.cut import Cut
from uoe_jax.decompose.measure import layer_error
from uoe_jax.decompose.number import (
    NothingSeparable,
    allowed_experts,
    choose_num_experts,
)
from uoe_jax.decompose.plan import as_written, make_plan
from uoe_jax.decompose.split import union_config
from uoe_jax.errors import ConfigError
from uoe_jax.model import with_params
from uoe_jax.runs.probe import mean_loss, probe

QUICK = ("contiguous", "random", "coactivation")


@pytest.fixture(scope="module")
def dense():
    config = dataclasses.replace(DENSE, d_ff=48)
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (40, 16), 0, 48))
    ones = np.ones_like(tokens)
    halves = [
        {
            "tokens": part,
            "segments": part * 0 + 1,
            "positions": ones[: len(part)].cumsum(axis=1) - 1,
            "targets": np.roll(part, -1, axis=1),
            "mask": ones[: len(part)].astype(np.float32),
        }
        for part in (tokens[:30], tokens[30:])
    ]
    return with_params(config, draw(config, 11)), *halves


def test_an_error_is_that_of_a_plain_loop():
    rng = np.random.default_rng(0)
    neurons, w_down = rng.normal(size=(9, 8)), rng.normal(size=(8, 5))
    wanted, gates = neurons @ w_down, np.zeros((9, 4))
    gates[:, 0] = 1  # always on
    gates[np.arange(9), rng.integers(1, 4, 9)] = 1.1
    outputs = [
        neurons[:, 2 * e : 2 * e + 2] @ w_down[2 * e : 2 * e + 2] for e in range(4)
    ]
    routed = sum(gates[:, e : e + 1] * outputs[e] for e in range(4)) - wanted
    best = [
        max((1, 2, 3), key=lambda e: np.linalg.norm(outputs[e][n])) for n in range(9)
    ]
    oracle = [outputs[0][n] + outputs[e][n] - wanted[n] for n, e in enumerate(best)]
    found = layer_error(neurons, wanted, w_down, gates)
    length = np.linalg.norm(wanted)
    assert_close(found.routed, np.linalg.norm(routed) / length, 1e-5)
    assert_close(found.oracle, np.linalg.norm(oracle) / length, 1e-5)
    assert layer_error(neurons, wanted, w_down, np.ones((9, 4))).routed < 1e-6


@pytest.mark.parametrize("refit", [False, True])
def test_the_best_grouping_on_held_out_data_is_taken(dense, monkeypatch, refit):
    monkeypatch.setattr(compare, "GROUPINGS", QUICK)
    model, batch, held = dense
    cut = Cut(num_experts=8, top_k=4, parts=("mlp",), shared=1, refit=refit)
    union = union_config(model.config, 8, 4, ("mlp",), None, 1)
    plan, rows = compare_groupings(model, union, cut, batch, held)
    assert [row.cut.grouping for row in rows] == list(QUICK)
    best = min(rows, key=lambda row: row.loss)
    for row in rows:  # each is what the cut alone gives
        alone = make_plan(model, union, row.cut, batch)
        written = with_params(union, *as_written(alone, union))
        assert_close(probe(model, written, held).loss, row.loss, 1e-5)
        assert len(row.errors) == model.config.num_layers
        assert all(0 < error < 2 for error in row.errors + row.oracle)
        if row is best:
            assert (alone.order == plan.order).all()
    assert_close(mean_loss(model, held), probe(model, model, held).loss, 1e-6)


def test_nothing_is_compared_where_all_experts_are_chosen(dense):
    model, batch, held = dense
    cut = Cut(num_experts=8, parts=("mlp",), grouping="all")
    with pytest.raises(ConfigError, match="a token uses all 8"):
        cut.check()
    union = union_config(model.config, 8, 8, ("mlp",))
    with pytest.raises(ConfigError, match="lose nothing"):
        compare_groupings(model, union, cut, batch, held)


def planted(groups, width=48):
    """A dense model whose neurons are copies of `groups` different ones, scaled."""
    config = dataclasses.replace(DENSE, d_ff=width, use_bias=False)
    params = {k: np.array(v) for k, v in draw(config, 3).items()}
    rng = np.random.default_rng(2)
    for name in params:
        if "mlp.w_up" in name or "mlp.w_gate" in name:
            first = params[name][..., :groups]
            copies = first[..., np.arange(width) % groups]
            params[name] = copies * rng.uniform(0.97, 1.03, width).astype(np.float32)
    return with_params(config, params)


def test_as_many_experts_as_there_are_kinds_of_neurons(dense):
    _, batch, _ = dense
    model = planted(4)
    config = ExperimentConfig(model=model.config)
    cut = Cut(num_experts="auto", parts=("mlp",))
    number = choose_num_experts(model, config, cut, batch)
    assert (number.wanted, number.chosen) == (4, 4)
    assert number.layers == [4] * model.config.num_layers
    assert min(number.prices.values()) == 0
    # What the mesh can't divide gives way to the nearest that it can.
    uneven = dataclasses.replace(config, mesh=MeshConfig(tensor=3))
    assert choose_num_experts(model, uneven, cut, batch).chosen == 3


def test_neurons_without_parts_are_said_to_be_one(dense):
    model, batch, _ = dense
    config = ExperimentConfig(model=model.config)
    cut = Cut(num_experts="auto", parts=("mlp",))
    with pytest.raises(NothingSeparable, match="one.*give --experts"):
        choose_num_experts(model, config, cut, batch)


def test_numbers_that_fit_divide_neurons_heads_and_mesh(dense):
    config = ExperimentConfig(model=dense[0].config)
    mlp = Cut(num_experts="auto", parts=("mlp",), max_experts=12)
    assert allowed_experts(config, mlp) == [2, 3, 4, 6, 8, 12]
    heads = dataclasses.replace(mlp, parts=("attention", "mlp"))
    # Not fewer than a token uses, nor than leave some off where that is asked for.
    for wish, least in (({"top_k": 4}, 4), ({"shared": 2}, 3),
                        ({"top_k": 4, "refit": True}, 6)):  # fmt: skip
        wanted = dataclasses.replace(mlp, **wish)
        wanted.check()
        assert allowed_experts(config, wanted)[0] == least
    count = config.model.num_kv_heads
    assert allowed_experts(config, heads) == [
        e for e in (2, 3, 4, 6, 8, 12) if not count % e
    ]
    narrow = dataclasses.replace(config, mesh=MeshConfig(tensor=5))
    with pytest.raises(ConfigError, match="multiple of mesh.tensor 5"):
        allowed_experts(narrow, mlp)
