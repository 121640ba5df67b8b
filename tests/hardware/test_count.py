"""Counts against hand numbers and against the arrays a model really has."""

import dataclasses

import jax
import pytest
from flax import nnx

from uoe_jax.config import ModelConfig, MoeConfig, UnionConfig
from uoe_jax.hardware import count, devices
from uoe_jax.model import make_model
from uoe_jax.presets import PRESETS, get_preset


@pytest.mark.parametrize("name", PRESETS)
def test_counted_parameters_are_the_models(name):
    model = get_preset(name).model
    built = jax.eval_shape(lambda: make_model(model, jax.random.key(0)))
    leaves = jax.tree.leaves(nnx.state(built, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == sum(count.count_params(model).values())


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("mlp", ["dense", "union", "moe"])
def test_counted_parameters_follow_the_options(norm, activation, mlp):
    model = ModelConfig(
        norm=norm,
        activation=activation,
        mlp=(mlp,),
        attention=("union", "dense"),
        use_bias=True,
        position="learned",
        num_heads=8,
        num_kv_heads=4,
        tie_embeddings=False,
        union=UnionConfig(num_experts=4, top_k=2),
    )
    built = jax.eval_shape(lambda: make_model(model, jax.random.key(0)))
    leaves = jax.tree.leaves(nnx.state(built, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == sum(count.count_params(model).values())


def test_small_is_125m_by_hand():
    parts = count.count_params(get_preset("small").model)
    assert parts["embedding"] == 50304 * 768
    assert parts["attention"] == 12 * 4 * 768 * 768
    assert parts["mlp"] == 12 * 2 * 768 * 3072
    assert 120e6 < sum(parts.values()) < 130e6


def test_dense_flops_by_hand():
    model = ModelConfig(
        d_model=4, d_ff=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=2
    )
    parts = count.flops_per_token(model, 3).parts
    assert parts["attention projections"] == 2 * 4 * 2 * (2 + 2 + 2)
    # Three tokens see 1, 2 and 3 keys: 2 on average.
    assert parts["attention scores"] == 4 * 2 * 2 * 2
    assert parts["mlp"] == 2 * 2 * 4 * 16
    assert parts["head"] == 2 * 4 * 256
    flops = count.flops_per_token(model, 3)
    assert flops.training == 3 * flops.forward == 3 * sum(parts.values())


def test_half_the_experts_halve_projections_and_quarter_scores():
    dense = get_preset("1b").model
    union = get_preset("1b-union").model
    a = count.flops_per_token(dense).parts
    b = count.flops_per_token(union).parts
    assert b["attention projections"] == a["attention projections"] / 2
    assert b["mlp"] == a["mlp"] / 2
    assert b["attention scores"] == pytest.approx(a["attention scores"] / 4, rel=1e-3)
    assert b["routers"] == 24 * 2 * 2 * 2048 * 16


def test_moe_of_default_width_costs_what_dense_costs():
    dense = get_preset("small").model
    moe = dataclasses.replace(dense, mlp=("moe",), moe=MoeConfig(num_experts=8))
    a, b = count.flops_per_token(dense).parts, count.flops_per_token(moe).parts
    assert a["mlp"] == b["mlp"]
    assert count.count_active_params(moe) == pytest.approx(
        count.count_active_params(dense), rel=1e-2
    )


def test_union_cache_holds_its_share_of_the_dense_bytes():
    dense, union = get_preset("small").model, get_preset("small-union").model
    assert count.cache_bytes(dense, 2, 100) == 2 * 2 * 100 * 12 * 64 * 2 * 12
    assert count.cache_bytes(union, 2, 100) * 2 == count.cache_bytes(dense, 2, 100)


def test_remat_keeps_fewer_activations():
    model = get_preset("1b").model
    kept = dataclasses.replace(model, remat="none")
    assert count.activation_bytes(model, 1) * 8 < count.activation_bytes(kept, 1)
    state = count.state_bytes(model)
    assert state["optimizer"] == 2 * state["parameters"]


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_devices_are_found_by_jax_names(kind, teraflops):
    assert devices.peak_flops(kind) == teraflops * 1e12


def test_unknown_devices_have_no_peak():
    assert devices.peak_flops("cpu") is None
