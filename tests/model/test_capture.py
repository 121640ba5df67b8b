"""What experts and heads add, held to the layer's own output and to zeroed weights."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uoe_jax as uoe
from tests.compare import assert_close as close
from tests.model.tiny_models import tiny, union
from uoe_jax.config import MobaConfig, MoeConfig, UnionConfig, UnionOverrides
from uoe_jax.errors import ConfigError
from uoe_jax.model import make_model
from uoe_jax.tree import named_leaves, replace_leaves

CASES = {
    "dense": tiny(use_bias=True),
    "union": union(use_bias=True, activation="swiglu"),
    "patches-of-two-heads": union(
        union=UnionConfig(num_experts=2, top_k=1, patch_size=3), remat="full"
    ),
    "pattern": tiny(
        num_layers=3,
        attention=("dense", "union"),
        mlp=("union", "moe"),
        moe=MoeConfig(num_experts=5, top_k=3, num_shared=1, d_expert=16),
        norm="layernorm",
    ),
    "shared-kv": union(
        union=UnionConfig(num_experts=4, top_k=2, num_shared=1, shared_kv=True)
    ),
    "key-router": union(
        union_attention=UnionOverrides(gated_values=True, key_router=True)
    ),
    "moba": tiny(attention=("moba",), moba=MobaConfig(block_size=4, top_k=2)),
    "moh": tiny(attention=("moh",), union=UnionConfig(num_experts=4, top_k=2)),
}


def assert_close(found, expected):
    close(found, expected, 2e-5)


TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, 61)


def model_of(name):
    """A model whose biases, zero at the start, aren't."""
    model = make_model(CASES[name], 3)
    shift = {
        leaf: jnp.full(array.shape, 0.1)
        for leaf, array in named_leaves(model).items()
        if leaf.rpartition(".")[2].startswith("b") and "router" not in leaf
    }
    return replace_leaves(model, shift)


def without_weights(model, name, index):
    """The model with some rows of a stacked weight zero."""
    leaf = named_leaves(model)[name]
    return replace_leaves(model, {name: leaf.at[index].set(0.0)})


@pytest.mark.parametrize("name", CASES)
def test_experts_and_heads_add_up_to_the_layers_output(name):
    model, config = model_of(name), CASES[name]
    seen = uoe.capture(model)(TOKENS)
    logits, aux = jax.jit(lambda m, t: m(t))(model, TOKENS)
    assert_close(seen.logits, logits)
    chex.assert_trees_all_equal_structs(seen.aux, aux)
    places = {(p, i) for p in ("attention", "mlp") for i in range(config.num_layers)}
    assert set(seen.experts) == set(seen.outputs) == places
    for part, layer in places:
        total = seen.experts[part, layer].sum(0) + seen.bias[part, layer][None, None]
        assert_close(total, seen.outputs[part, layer])
        assert float(jnp.abs(seen.outputs[part, layer]).max()) > 0
    for layer, heads in seen.heads.items():
        assert heads.shape == (config.num_heads, 2, 12, config.d_model)
        experts = seen.experts["attention", layer]
        grouped = heads.reshape(experts.shape[0], -1, *heads.shape[1:]).sum(1)
        assert_close(grouped, experts)


def test_a_token_gets_nothing_from_an_expert_it_didnt_choose():
    model = model_of("union")
    seen = uoe.capture(model)(TOKENS, collect_choices=True)
    choices = np.asarray(seen.aux["mlp"]["choices"])
    for layer in range(2):
        added = np.abs(np.asarray(seen.experts["mlp", layer])).max(-1) > 0
        chosen = (choices[layer][..., None] == np.arange(4)).any(2)
        np.testing.assert_array_equal(np.moveaxis(added, 0, -1), chosen)


@pytest.mark.parametrize(
    ("name", "off", "weight", "index"),
    [
        # wo [L, E, J, G, H, D]; query head 5 is expert 2's second, key head 0, group 1.
        ("union", ("attention", 1, None, 5), "attention.wo", np.s_[1, 2, 0, 1]),
        ("union", ("attention", 0, 3, None), "attention.wo", np.s_[0, 3]),
        ("union", ("mlp", 1, 2, None), "mlp.w_down", np.s_[1, 2]),
        ("dense", ("attention", 0, None, 5), "attention.wo", np.s_[0, 0, 2, 1]),
        ("dense", ("mlp", 1, 0, None), "mlp.w_down", np.s_[1, 0]),
        ("patches-of-two-heads", ("attention", 1, None, 5), "attention.wo",
         np.s_[1, 1, 0, 1]),
        ("shared-kv", ("attention", 1, 0, None), "attention.wo", np.s_[1, 0]),
    ],
)  # fmt: skip
def test_switched_off_is_as_with_zero_weights(name, off, weight, index):
    model = model_of(name)
    part, layer, expert, head = off
    probe = uoe.capture(model).without(part, layer, expert=expert, head=head)
    zeroed = without_weights(model, f"trunk.blocks.0.{weight}", index)
    seen = probe(TOKENS)
    expected = uoe.capture(zeroed)(TOKENS)
    assert_close(seen.logits, expected.logits)
    assert float(jnp.abs(seen.logits - uoe.capture(model)(TOKENS).logits).max()) > 1e-4
    assert_close(seen.outputs[part, layer], expected.outputs[part, layer])


def test_replaced_takes_arrays_and_functions_one_after_another():
    model = model_of("union")
    plain = uoe.capture(model)(TOKENS).experts["mlp", 1]
    mean = lambda y: y.mean((0, 1), keepdims=True)
    probe = uoe.capture(model).replaced("mlp", 1, mean, expert=2)
    probe = probe.replaced("mlp", 1, jnp.ones(32), expert=0)
    probe = probe.replaced("mlp", 1, lambda y: 2 * y, expert=0)
    seen = probe(TOKENS)
    expected = plain.at[2].set(jnp.broadcast_to(mean(plain[2]), plain[2].shape))
    expected = expected.at[0].set(2.0)
    assert_close(seen.experts["mlp", 1], expected)
    total = expected.sum(0) + seen.bias["mlp", 1][None, None]
    assert_close(seen.outputs["mlp", 1], total)


def test_the_model_itself_stays_as_it_is():
    model = model_of("pattern")
    before = jax.tree.structure(model), repr(model)
    uoe.capture(model).without("mlp", 1, expert=1)(TOKENS)
    assert (jax.tree.structure(model), repr(model)) == before


def test_images_too():
    config = dataclasses.replace(uoe.get_preset("digits-vit-union").model, num_layers=1)
    model = make_model(config, 0)
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    seen = uoe.capture(model)(images)
    assert_close(seen.logits, jax.jit(lambda m, x: m(x)[0])(model, images))
    assert seen.experts["attention", 0].shape == (4, 2, 16, 64)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p: p.without("mlp", 2, expert=0), "layer is 2; mlp has 0 to 1"),
        (lambda p: p.without("mlp", 0, expert=4), "expert is 4; mlp has 0 to 3"),
        (lambda p: p.without("attention", 0, head=8), "head is 8; attention has 0 to"),
        (lambda p: p.without("mlp", 0, head=0), "expert is None and head 0"),
        (lambda p: p.without("mlp", 0), "expert is None and head None"),
    ],
)
def test_what_isnt_there_is_refused(call, says):
    probe = uoe.capture(make_model(CASES["union"], 0))
    with pytest.raises((ConfigError), match=says):
        call(probe)
