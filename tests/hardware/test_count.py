"""Counts against hand numbers and against the arrays a model really has."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from uoe_jax.config import (
    MobaConfig,
    ModConfig,
    ModelConfig,
    MoeConfig,
    UnionConfig,
    UnionOverrides,
)
from uoe_jax.hardware import count, devices
from uoe_jax.model import init_cache, make_model
from uoe_jax.presets import PRESETS, get_preset

pytestmark = pytest.mark.both_jax


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


ROUTED = UnionConfig(num_experts=4, top_k=3, num_shared=1)
TWO_ALWAYS_ON = UnionConfig(num_experts=4, top_k=4, num_shared=2)
KINDS = {
    "dense": {},
    "union": {"attention": ("union",), "mlp": ("union",)},
    "always-on": {"attention": ("union",), "mlp": ("union",), "union": ROUTED},
    "shared keys": {
        "attention": ("union",),
        "union_attention": UnionOverrides(num_experts=2, top_k=1, shared_kv=True),
    },
    "selection": {
        "mlp": ("union",),
        "union": UnionConfig(num_experts=4, top_k=2, router="selection"),
    },
    "hierarchical": {
        "attention": ("union",),
        "mlp": ("union",),
        "union": UnionConfig(
            num_experts=4, top_k=2, router="hierarchical", selected=3, num_shared=1
        ),
    },
    "moh": {"attention": ("moh",), "union": ROUTED},
    "moh, two always on": {"attention": ("moh",), "union": TWO_ALWAYS_ON},
    "moba": {"attention": ("moba",), "moba": MobaConfig(block_size=2, top_k=2)},
    "mod": {"blocks": ("all", "mod"), "mod": ModConfig(keep=0.5)},
    "deepseek": {
        "mlp": ("moe",),
        "moe": MoeConfig(num_experts=6, top_k=4, num_shared=1, gate="sigmoid"),
    },
}


def small(**options):
    """Four key heads of two query heads each, two layers."""
    defaults = {"union": UnionConfig(num_experts=4, top_k=2), "num_layers": 2}
    sizes = {"d_model": 8, "d_ff": 16, "num_heads": 8, "num_kv_heads": 4, "head_dim": 2}
    return ModelConfig(**{**sizes, **defaults, **options})


@pytest.mark.parametrize("name", KINDS)
def test_parameters_and_cache_of_every_kind_are_the_arrays(name):
    model = small(use_bias=True, **KINDS[name])
    built = jax.eval_shape(lambda: make_model(model, jax.random.key(0)))
    leaves = jax.tree.leaves(nnx.state(built, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == sum(count.count_params(model).values())
    cache = jax.eval_shape(lambda: init_cache(model, 3, 8))
    held = [entry[part] for entry in cache.layers for part in ("k", "v")]
    assert sum(a.size * 4 for a in held) == count.cache_bytes(model, 3, 8)
    assert count.count_active_params(model) <= sum(leaf.size for leaf in leaves)


# Multiply-adds of one layer for 8 tokens, counted one by one: (query, key, head) pairs
# that are scored, and projections of a token by a head.
def pairs_of_sets(sets):
    """Causal pairs inside sets of tokens, one set for each of the 8 query heads."""
    return sum(len(s) * (len(s) + 1) // 2 for s in sets)


EVERY, HALF = list(range(8)), [0, 2, 4, 6]
BY_HAND = {
    # Balanced: each of four experts (two query heads each) sees every other token.
    "union": (pairs_of_sets([HALF] * 8), 8 * 4, 4 * 4),
    # One expert sees all, of three others each sees two thirds: 16 / 3 tokens.
    "always-on": (2 * 36 + 6 * (16 / 3) * (16 / 3 + 1) / 2, 8 * 6, 8 * 3),
    # Half of the 8 queries, all keys of their past; all 4 key heads are projected.
    "shared keys": (8 * sum(t + 1 for t in EVERY) / 2, 8 * 4, 8 * 4),
    "moh": (0.75 * 8 * sum(t + 1 for t in EVERY), 8 * 6, 8 * 4),
    # Blocks of 2: the own one up to the token, and one whole earlier one.
    "moba": (8 * sum(t % 2 + 1 + 2 * (t >= 2) for t in EVERY), 8 * 8, 8 * 4),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_attention_flops_by_hand(name):
    model = small(num_layers=1, **KINDS[name])
    pairs, queries, keys = BY_HAND[name]
    if name == "union":
        keys = 8 * 2  # 8 tokens, half of the 4 key heads
    parts = count.flops_per_token(model, 8).parts
    # Scores and weighted sums: 2 FLOPs for each of the 2 numbers of a head, twice.
    assert parts["attention scores"] * 8 == pytest.approx(pairs * 2 * 2 * 2)
    # Queries and outputs, keys and values: 2 FLOPs for each of 8 x 2 weights.
    wanted = 2 * queries * 8 * 2 * 2 + 2 * keys * 8 * 2 * 2
    assert parts["attention projections"] * 8 == pytest.approx(wanted)


def test_router_flops_by_hand():
    routers = lambda name: count.flops_per_token(
        small(num_layers=1, **KINDS[name]), 8
    ).parts.get("routers")
    assert routers("dense") is None
    assert routers("union") == 2 * (2 * 8 * 4)
    assert routers("always-on") == 2 * (2 * 8 * 3)
    assert routers("hierarchical") == 2 * (2 * 8 * 2 * 3)
    assert routers("moh") == 2 * 8 * (3 + 2)  # routed heads, and the split
    two = small(num_layers=1, attention=("moh",), union=TWO_ALWAYS_ON)
    assert count.flops_per_token(two, 8).parts["routers"] == 2 * 8 * (2 + 2 + 2)
    # Blocks of 2 of 8 tokens: 0 to 3 earlier blocks' means meet 8 queries 2 wide.
    assert routers("moba") == 2 * 8 * 2 * 1.5


def test_a_mixture_of_depths_costs_half_a_block_and_short_sequences():
    whole, mixed = small(), small(**KINDS["mod"])
    a, b = (count.flops_per_token(m, 8).parts for m in (whole, mixed))
    assert b["mlp"] == a["mlp"] * 0.75
    assert b["attention projections"] == a["attention projections"] * 0.75
    # Eight heads of width 2: 4.5 keys a token, or for half of the tokens 2.5.
    assert b["attention scores"] == 4 * 8 * 2 * (4.5 + 0.5 * 2.5)
    assert b["routers"] == 2 * 8
    assert count.count_active_params(mixed) < count.count_active_params(whole)


def test_dense_flops_are_what_the_compiler_counts():
    model = small(num_layers=1, max_seq_len=8)
    built = make_model(model, jax.random.key(0))
    program = jax.make_jaxpr(lambda x: built(x)[0])(np.zeros((1, 8), int))
    counted = {"attention scores": 0.0, "rest": 0.0}
    for equation in dot_products(program.jaxpr):
        (contract, _), (batch, _) = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        out = np.prod(equation.outvars[0].aval.shape)
        part = "attention scores" if batch else "rest"
        counted[part] += 2 * out * np.prod([left[i] for i in contract])
    parts = count.flops_per_token(model, 8).parts
    # The written-out scores are all T x T; the causal half (T + 1) / 2T of it counts.
    assert counted["attention scores"] * 9 / 16 == parts["attention scores"] * 8
    rest = sum(n for name, n in parts.items() if name != "attention scores")
    assert counted["rest"] == rest * 8


def dot_products(jaxpr):
    """Every product of a program, those of inner programs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in equation.params.values():
            if inner := getattr(value, "jaxpr", None):
                yield from dot_products(inner)


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
