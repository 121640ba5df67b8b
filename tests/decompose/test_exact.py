"""A union cut from a dense model is that model: weights, logits, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.config import HeadGroups, ModelConfig
from uoe_jax.decompose.split import (
    merge_params,
    merged_config,
    split_params,
    union_config,
)
from uoe_jax.errors import ConfigError
from uoe_jax.model import flat_params, make_model, param_shapes, with_params

DENSE = ModelConfig(
    vocab_size=48,
    max_seq_len=16,
    d_model=16,
    d_ff=24,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    activation="swiglu",
    use_bias=True,
)


def draw(config, seed):
    """Random parameters of a config, no model built; biases aren't zero."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype)
        for name, leaf in param_shapes(config).items()
    }


def orders(config, seed):
    rng = np.random.default_rng(seed)
    return np.stack(
        [rng.permutation(config.d_ff) for _ in range(config.num_layers)]
    ).astype(np.int32)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([("attention", "mlp"), ("mlp",), ("attention",)]),
    st.booleans(),
    st.booleans(),
)
def test_merging_undoes_splitting_bit_for_bit(seed, experts, parts, biased, permuted):
    dense = dataclasses.replace(DENSE, use_bias=biased)
    union = union_config(dense, experts, 1, parts)
    params = draw(dense, seed)
    order = orders(dense, seed) if permuted else None
    split = split_params(params, dense, union, order)
    assert {k: a.shape for k, a in split.items()} == {
        k: leaf.shape for k, leaf in param_shapes(union).items()
    }
    back = merge_params(split, union, merged_config(union), order)
    assert back.keys() == params.keys()
    assert all(back[name].tobytes() == params[name].tobytes() for name in params)


@pytest.fixture(scope="module")
def pair():
    """Dense and union losses with their gradients on the same tokens."""
    union = union_config(DENSE, 4, 4)
    params, order = draw(DENSE, 3), orders(DENSE, 3)
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, DENSE.vocab_size)

    def run(config, params):
        graphdef, state, rest = nnx.split(with_params(config, params), nnx.Param, ...)

        @jax.jit
        def loss(state):
            logits = nnx.merge(graphdef, state, rest)(tokens)[0]
            weight = jnp.sin(jnp.arange(logits.size)).reshape(logits.shape)
            return jnp.mean(logits * weight), logits

        with jax.default_matmul_precision("highest"):
            grads, logits = jax.grad(loss, has_aux=True)(state)
        return np.asarray(logits), flat_params(nnx.merge(graphdef, grads, rest))

    dense = run(DENSE, params)
    return dense, run(union, split_params(params, DENSE, union, order)), union, order


def test_union_of_all_experts_is_the_dense_model(pair):
    (dense, _), (union, _), *_ = pair
    assert abs(dense).max() > 0.5
    np.testing.assert_allclose(union, dense, atol=1e-5 * max(1, abs(dense).max()))


def test_gradients_are_the_dense_models_split(pair):
    (_, dense), (_, grads), union, order = pair
    merged = merge_params(grads, union, DENSE, order)
    for name, gradient in dense.items():
        scale = abs(gradient).max()
        assert scale > 0
        np.testing.assert_allclose(merged[name], gradient, atol=2e-5 * scale)


def test_every_parameter_of_a_union_gets_a_gradient(pair):
    _, (_, grads), *_ = pair
    assert any(".router." in name for name in grads)
    for name, gradient in grads.items():
        axes = tuple(range(1, gradient.ndim))
        if gradient.ndim > 1 and "blocks" in name:  # each layer's own
            assert (abs(gradient).max(axis=axes) > 0).all(), name
        assert abs(gradient).max() > 0, name


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"attention": ("union",)}, "union already"),
        ({"mlp": ("moe",)}, "'moe' layers"),
        ({"attention": ("moba",)}, "'moba' layers"),
        ({"blocks": ("all", "mod")}, "'mod' layers"),
    ],
)
def test_only_dense_models_are_cut(change, part):
    with pytest.raises(ConfigError, match=part):
        union_config(dataclasses.replace(DENSE, **change), 2, 1)


def test_wrong_cuts_are_one_line():
    union = union_config(DENSE, 4, 2)
    params = draw(DENSE, 0)
    with pytest.raises(ConfigError, match="dense already"):
        merged_config(DENSE)
    with pytest.raises(ConfigError, match="no part"):
        union_config(DENSE, 4, 2, ())
    with pytest.raises(ConfigError, match="experts don't divide"):
        split_params(params, DENSE, union_config(DENSE, 5, 2, ("mlp",)))
    with pytest.raises(ConfigError, match="one of 1, 2, 4, or cut the MLP alone"):
        union_config(DENSE, 8, 2)  # more experts than key/value heads
    union_config(DENSE, 8, 2, ("mlp",))
    assert union_config(DENSE, 8, 2, attention_experts=4).union_for("attention")
    wide = dataclasses.replace(union, d_model=32)
    with pytest.raises(ConfigError, match="the same sizes"):
        split_params(params, DENSE, wide)
    twice = np.zeros((2, 24), np.int32)
    with pytest.raises(ConfigError, match="takes a permutation"):
        split_params(params, DENSE, union, twice)
    for change in ({"router": "threshold"}, {"gate": "relu"}):
        own = dataclasses.replace(DENSE.union, **change)
        with pytest.raises(ConfigError, match="off where routers are zero"):
            union_config(dataclasses.replace(DENSE, union=own), 4, 2)


def test_a_window_of_no_heads_adds_nothing():
    groups = HeadGroups(window=64)
    union_config(dataclasses.replace(DENSE, head_groups=groups), 4, 2)
    local = dataclasses.replace(groups, local=2)
    with pytest.raises(ConfigError, match="model.head_groups"):
        union_config(dataclasses.replace(DENSE, head_groups=local), 4, 2)


def test_heads_may_be_cut_into_another_number():
    union = union_config(DENSE, 8, 4, attention_experts=2)
    assert union.union_for("attention").num_experts == 2
    assert union.union_for("attention").top_k == 1
    assert union.union_for("mlp").top_k == 4
    params = draw(DENSE, 1)
    split = split_params(params, DENSE, union)
    back = merge_params(split, union, DENSE)
    assert all(np.array_equal(back[name], params[name]) for name in params)


def test_flat_names_are_the_models():
    model = make_model(DENSE, jax.random.key(0))
    params = flat_params(model)
    assert {k: a.shape for k, a in params.items()} == {
        k: leaf.shape for k, leaf in param_shapes(DENSE).items()
    }
    again = flat_params(with_params(DENSE, params))
    assert all(np.array_equal(again[name], params[name]) for name in params)
