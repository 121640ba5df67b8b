"""A union of experts with adapters: routed rows only, and the merged model's output."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.adapt.moved_adapters import draw_model
from uoe_jax.adapt import AdapterConfig, adapted_params, apply_adapted
from uoe_jax.adapt.evaluate.cost import cut_network
from uoe_jax.config import ModelConfig, UnionConfig

CONFIG = ModelConfig(
    vocab_size=31,
    max_seq_len=16,
    d_model=16,
    d_ff=32,
    num_layers=1,
    scan_layers=False,  # the tests read the operations of the block
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    attention=("union",),
    mlp=("union",),
    activation="swiglu",
    union=UnionConfig(num_experts=4, top_k=2),
)
ADAPTERS = {
    "lora": {"method": "lora"},
    "lora, shared": {"method": "lora", "share_experts": True},
    "tucker, heads, shared": {"split_heads": True, "share_experts": True},
}


@pytest.fixture(scope="module")
def union():
    graphdef, params, buffers = draw_model(CONFIG)
    tokens = jnp.arange(24).reshape(2, 12) * 7 % 31
    fn = lambda p, t: nnx.merge(graphdef, p, buffers)(t)[0]
    return params, tokens, jax.jit(fn), fn


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapted_union_is_the_merged_union(union, kind, make):
    params, tokens, base, fn = union
    adapters = make(params, AdapterConfig(rank=2, alpha=1.0, **ADAPTERS[kind]))
    want = base(jax.jit(adapted_params)(params, adapters), tokens)
    assert float(jnp.abs(want - base(params, tokens)).max()) > 0.1
    got = jax.jit(lambda a, t: apply_adapted(fn, params, a, t))(adapters, tokens)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_only_routed_rows_are_computed(union, make):
    """No expert's delta exists, and grouped products have a row for each pick only."""
    params, tokens, _, fn = union
    adapters = make(params, AdapterConfig(method="lora", rank=2))
    run = lambda a, t: apply_adapted(fn, params, a, t)
    outer = jax.make_jaxpr(run)(adapters, tokens)
    rows = tokens.size * CONFIG.union.top_k
    experts, width = CONFIG.union.num_experts, CONFIG.d_model
    deltas, heights = [], set()
    factors = {(experts, width, 2), (experts, 2, width)}
    for eqn in outer.jaxpr.eqns:
        shapes = [v.aval.shape for v in eqn.outvars]
        if eqn.primitive.name != "custom_vjp_call":
            # [E, D, F/E] or more: a whole delta would come out of a product.
            if eqn.primitive.name == "dot_general":
                stacks = [s for s in shapes if len(s) == 3 and s[0] == experts]
                deltas += [s for s in stacks if min(s[1:]) > 2]
            continue
        weights = {v.aval.shape for v in eqn.invars}
        if weights & factors or any(s[-1:] == (2,) for s in shapes):
            heights.update(s[0] for s in shapes)
    assert not deltas
    assert heights <= {rows, tokens.size} and rows in heights


def test_layers_of_an_unrolled_stack_keep_their_factors(make):
    config = dataclasses.replace(CONFIG, num_layers=2, attention=("dense",))
    graphdef, params, buffers = draw_model(config)
    fn = lambda p, t: nnx.merge(graphdef, p, buffers)(t)[0]
    tokens = jnp.arange(12).reshape(1, 12) * 7 % 31
    adapters = make(params, AdapterConfig(method="lora", rank=2, alpha=1.0))
    run = lambda a, t: apply_adapted(fn, params, a, t)
    want = jax.jit(fn)(adapted_params(params, adapters), tokens)
    np.testing.assert_allclose(jax.jit(run)(adapters, tokens), want, atol=1e-5)
    made = jax.make_jaxpr(run)(adapters, tokens)
    shapes = [
        v.aval.shape
        for eqn in made.jaxpr.eqns
        if eqn.primitive.name == "custom_vjp_call"
        for v in eqn.outvars
    ]
    # Up and down of both layers go through the two numbers of the rank.
    assert sum(s[-1:] == (2,) for s in shapes) >= 4


def test_work_of_the_delta_falls_with_the_experts_chosen(union, make):
    """Rows of the delta's products, hence its FLOPs, follow top_k, not the experts."""
    tokens = union[1]
    counted = {}
    for top_k in (1, 2, 4):
        config = dataclasses.replace(
            CONFIG,
            attention=("dense",),  # the MLP's rows are enough to count
            union=dataclasses.replace(CONFIG.union, top_k=top_k),
        )
        graphdef, params, buffers = draw_model(config)
        fn = lambda p, t, g=graphdef, b=buffers: nnx.merge(g, p, b)(t)[0]
        adapters = make(params, AdapterConfig(method="lora", rank=2))
        run = lambda a, t, fn=fn, p=params: apply_adapted(fn, p, a, t)
        made = jax.make_jaxpr(run)(adapters, tokens)
        flops = 0
        for eqn in made.jaxpr.eqns:
            weights = [v.aval.shape for v in eqn.invars if v.aval.ndim == 3]
            if eqn.primitive.name == "custom_vjp_call" and weights:
                skinny = [w for w in weights if 2 in w[1:]]
                height = eqn.outvars[0].aval.shape[0]
                flops += sum(2 * height * w[1] * w[2] for w in skinny)
        counted[top_k] = flops
    # Products into tokens (project_scatter) have a row a token whatever top_k is.
    assert counted[1] < counted[2] < counted[4]
    assert counted[4] - counted[2] == 2 * (counted[2] - counted[1])


def test_cuts_are_the_narrowest():
    sizes = dict(e=4, d=16, f=8, j=2, h=4, A=8, B=3, C=2, D=2)
    left, right, cut = cut_network(("eAB", "edA", "efB"), "d", "f", sizes)
    assert (left, right, cut) == ([1, 0], [2], "Be")
    left, right, cut = cut_network(("eR", "edR", "eRf"), "d", "f", sizes | {"R": 2})
    assert set(left) | set(right) == {0, 1, 2} and "R" in cut
