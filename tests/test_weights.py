"""The table of weights says what the models have, and what layouts make of it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.config import HeadGroups, LayerWidths, ModelConfig
from uoe_jax.model import abstract_model, make_model, param_shapes
from uoe_jax.presets import PRESETS, get_preset
from uoe_jax.tree import fill_leaves, leaf_name, named_leaves, replace_leaves
from uoe_jax.weights import find_weight, is_decayed, model_params

ROUTERS = ("token", "expert_choice", "selection", "hierarchical", "threshold")


def small(**changes):
    sizes = {"d_model": 16, "d_ff": 32, "num_layers": 3, "num_heads": 8}
    sizes |= {"num_kv_heads": 4, "head_dim": 4, "vocab_size": 32}
    model = ModelConfig(**sizes)
    union = {"num_experts": 4, "top_k": 3, "selected": 3}
    union |= changes.pop("union", {})
    union = dataclasses.replace(model.union, **union)
    moe = dataclasses.replace(model.moe, **changes.pop("moe", {}))
    return dataclasses.replace(model, union=union, moe=moe, **changes)


CASES = {
    "dense": small(),
    "biases": small(use_bias=True, norm="layernorm", activation="swiglu"),
    "learned positions": small(position="learned", tie_embeddings=False),
    "alternating": small(attention=("dense", "union"), mlp=("union", "moe", "dense")),
    "biased union": small(attention=("union",), mlp=("union",), use_bias=True),
    "shared": small(
        attention=("moh",), mlp=("moe",), union={"num_shared": 2}, moe={"num_shared": 1}
    ),
    "one shared head": small(attention=("moh",), union={"num_shared": 1}),
    "depths": small(blocks=("all", "mod"), attention=("moba",)),
    "encoder": small(kind="encoder", num_classes=7),
    "vision": small(kind="vision", image_channels=3, position="learned"),
    "qkv bias": small(attention_bias="qkv", mlp_bias=True, qk_norm=True),
    "windows": small(attention=("union",), window=(0, 4), qk_norm=True),
    "groups": small(
        attention=("union",),
        attention_bias="qkv",
        qk_norm=True,
        head_groups=HeadGroups(local=4, full=2, full_kv=1),
    ),
    "convolution": small(attention=("moh",), convolution=4),
    "output gate": small(attention=("union", "dense"), output_gate=True),
    "sink": small(attention=("union", "dense"), sink=True),
    "post norm": small(
        kind="encoder",
        norm_place="post",
        norm="layernorm",
        embed_norm=True,
        token_types=2,
        pooling="tanh",
        encoder_head="tokens",
        position="learned",
    ),
    "hidden": small(kind="encoder", encoder_head="none", pooling="tanh"),
    "class token": small(
        kind="vision", class_token=True, position="learned", pooling="first"
    ),
    **{
        f"router {name}": small(
            kind="encoder", mlp=("union",), attention=("union",), union={"router": name}
        )
        for name in ROUTERS
    },
}


def check(model):
    built = {name: leaf.shape for name, leaf in param_shapes(model).items()}
    assert {name: param.shape for name, param in model_params(model).items()} == built


@pytest.mark.parametrize("name", ["dense", "union", "narrow"])
def test_a_model_of_shapes_alone_is_the_drawn_one_but_for_its_numbers(name):
    narrow = LayerWidths(d_ff=(16, 8, 16), value_dim=(4, 2, 3))
    changes = {"dense": {}, "union": {"mlp": ("union",)}, "narrow": {"widths": narrow}}
    config = small(**changes[name], param_dtype="bfloat16")
    drawn = nnx.split(make_model(config, 3), nnx.Param, ...)
    kind = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    shapes = abstract_model(config)
    assert shapes[0] == drawn[0] and kind(shapes[1:]) == kind(drawn[1:])
    embedding = named_leaves(drawn[1])["embed.embedding"]
    assert float(jnp.abs(embedding).min()) < float(jnp.abs(embedding).max())


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_has_every_parameter_of_a_preset(name):
    check(get_preset(name).model)


@pytest.mark.parametrize("name", CASES)
def test_the_table_has_every_parameter_of_a_kind(name):
    check(CASES[name])


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_the_table_has_every_parameter_of_any_mixture_of_kinds(data):
    draw = lambda *values: data.draw(st.sampled_from(values))
    pattern = lambda *kinds: tuple(
        data.draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3))
    )
    shared = draw(0, 1, 2)
    check(
        small(
            attention=pattern("dense", "union", "moba", "moh"),
            mlp=pattern("dense", "union", "moe"),
            blocks=pattern("all", "mod"),
            num_layers=draw(1, 2, 5),
            use_bias=draw(True, False),
            norm=draw("rmsnorm", "layernorm"),
            activation=draw("gelu", "swiglu"),
            tie_embeddings=draw(True, False),
            union={"num_shared": shared},
        )
    )


@pytest.mark.parametrize("name", CASES)
def test_a_weight_is_found_by_its_name_alone(name):
    for path, param in model_params(CASES[name]).items():
        assert find_weight(path) == param.weight
    assert find_weight("trunk.blocks.0.attention.wz") is None
    assert find_weight("somebody.weight") is None


def test_only_matrices_that_no_router_owns_decay():
    decayed = {
        name.rpartition(".")[2]
        for name in model_params(CASES["shared"])
        if is_decayed(name)
    }
    assert decayed == {"embedding", "wq", "wk", "wv", "wo", "w_up", "w_down"}


def test_experts_divide_the_axis_that_a_dense_layer_splits_over_tensor():
    for model in (CASES["dense"], CASES["biased union"]):
        for name, param in model_params(model).items():
            axes = param.weight.mesh_axes(param.routed).split()
            if not param.weight.cut:
                assert "tensor" not in axes
                continue
            letter = param.weight.axes[axes.index("tensor")]
            assert letter == ("e" if param.routed else param.weight.cut), name


def test_leaves_are_named_replaced_and_filled():
    tree = {"a": [1, 2], "b": {"c": 3}}
    names = {"a.0": 1, "a.1": 2, "b.c": 3}
    assert named_leaves(tree) == names
    assert replace_leaves(tree, {"a.1": 5, "nothing": 6}) == {
        "a": [1, 5],
        "b": {"c": 3},
    }
    assert fill_leaves(tree, {n: v * 10 for n, v in names.items()}) == {
        "a": [10, 20],
        "b": {"c": 30},
    }
    with pytest.raises(KeyError, match="b.c"):
        fill_leaves(tree, {"a.0": 1, "a.1": 2})
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    assert list(map(leaf_name, paths)) == list(names)
