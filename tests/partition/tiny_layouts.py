"""Small experiments on eight devices, their gradients and their collectives."""

import dataclasses
import functools

import jax
import numpy as np

from uoe_jax.config import (
    DataConfig,
    ExperimentConfig,
    HeadGroups,
    LayerWidths,
    LayoutConfig,
    MeshConfig,
    ModelConfig,
    MoeConfig,
    RopeScaling,
    UnionConfig,
    UnionOverrides,
)
from uoe_jax.optim import make_optimizer
from uoe_jax.partition.mesh import mesh_for
from uoe_jax.runs.state import abstract_state, init_state, layout_of
from uoe_jax.train.step import make_gradients, put_batch
from uoe_jax.tree import leaf_name, named_leaves

KINDS = {
    "dense": {"attention": ("dense",), "mlp": ("dense",)},
    "moe": {"attention": ("dense",), "mlp": ("moe",)},
    "union": {"attention": ("union",), "mlp": ("union",)},
}
# What imported families have: norms of heads, windows, scaled rotation, fewer biases.
FAMILY = {
    "qk_norm": True,
    "window": (5,),
    "attention_bias": "qkv",
    "rope_scaling": RopeScaling(kind="linear", factor=2.0),
}
# Layers of unequal width: fewer pairs, values and neurons, and products of low rank.
KINDS["narrow"] = KINDS["dense"] | {
    "num_layers": 2,
    "widths": LayerWidths(
        d_ff=(16, 12),
        key_dim=(2, 4),
        value_dim=(3, 1),
        up_rank=(3, 0),
        gate_rank=(0, 4),
        down_rank=(5, 0),
    ),
}
KINDS |= {f"family {kind}": KINDS[kind] | FAMILY for kind in ("dense", "union")}
# Local and full heads beside those of a layer's kind.
GROUPS = {"head_groups": HeadGroups(local=4, window=5, full=4, full_kv=2)}
KINDS |= {f"groups {kind}": KINDS[kind] | GROUPS for kind in ("dense", "union")}
# Values times the gates of their own keys.
KINDS["gated values"] = KINDS["union"] | {
    "union_attention": UnionOverrides(gated_values=True)
}
# Keys and values with a router of their own.
KINDS["key router"] = KINDS["union"] | {
    "union_attention": UnionOverrides(gated_values=True, key_router=True)
}
KINDS["threshold"] = KINDS["union"] | {
    "union": UnionConfig(num_experts=4, top_k=2, router="threshold", num_shared=1)
}
KINDS |= {
    "output gate": KINDS["dense"] | GROUPS | {"output_gate": True},
    "output gate union": KINDS["union"] | {"output_gate": True},
    "sink": KINDS["dense"] | GROUPS | {"sink": True},
    "sink union": KINDS["union"] | {"sink": True},
}
KINDS["drawn"] = KINDS["union"] | {
    "union": UnionConfig(num_experts=4, top_k=4, least_top_k=1)
}
# Operands of eight bits, in float32: a layout may move a tie, so only about equal.
KINDS["float8"] = KINDS["union"] | {"float8": "rows"}
# A convolution before attention, whose first tokens lie on another device.
KINDS |= {
    "convolution": KINDS["dense"] | {"convolution": 4},
    "convolution union": KINDS["union"] | GROUPS | {"convolution": 3},
}


def make_config(kind, mesh=None, layout=None, **model):
    base = ModelConfig(
        vocab_size=64,
        max_seq_len=16,
        d_model=16,
        d_ff=32,
        **{
            "num_layers": 1,
            "union": UnionConfig(num_experts=4, top_k=2),
            **KINDS[kind],
        },
        num_heads=8,
        num_kv_heads=4,
        head_dim=4,
        use_bias=True,
        activation="swiglu",
        moe=MoeConfig(num_experts=4, top_k=2),
    )
    return ExperimentConfig(
        name=kind,
        model=dataclasses.replace(base, **model),
        data=DataConfig(batch_size=8, pack="documents", seq_len=16),
        mesh=MeshConfig(**{"data": 1, **(mesh or {})}),
        layout=LayoutConfig(**(layout or {})),
    )


def make_batch(seed=0, rows=8, length=16):
    """Two documents a row, the second cut at another place in each, some padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 64, (rows, length + 1)).astype(np.int32)
    place = np.arange(length)[None]
    cut = rng.integers(3, length - 3, (rows, 1))
    segments = np.where(place < cut, 1, 2).astype(np.int32)
    segments[0, -3:] = 0
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.where(place < cut, place, place - cut).astype(np.int32),
        "segments": segments,
        "mask": (segments > 0).astype(np.float32),
    }


@functools.cache
def first_state(kind):
    """A kind's static half and first state, initialised on one device."""
    config = make_config(kind)
    optimizer = make_optimizer(config.optim, 10)
    graphdef, state = init_state(config, optimizer, mesh_for(config))
    state = jax.device_get(state)

    def other_pairs(path, leaf):
        """Let the heads of narrow layers keep one pair each, in turns."""
        if not leaf_name(path).endswith("rotary_pairs"):
            return leaf
        assert leaf.shape == (1, 4, 1)
        return np.array([[[0], [1], [1], [0]]], leaf.dtype)

    def other_taps(path, leaf):
        """Let convolutions, gates and sinks, which start at 0, change something."""
        zeros = ("convolution.weight", "attention.wg", "attention.sink")
        if not leaf_name(path).endswith(zeros):
            return leaf
        draw = np.random.default_rng(1)
        return draw.normal(0, 0.5, leaf.shape).astype(leaf.dtype)

    buffers = jax.tree_util.tree_map_with_path(other_pairs, state.buffers)
    params = jax.tree_util.tree_map_with_path(other_taps, state.params)
    return graphdef, dataclasses.replace(state, buffers=buffers, params=params)


def compute(config):
    """Gradients by name with experts in their own order, sums, router statistics."""
    mesh = mesh_for(config)
    layout = layout_of(config, mesh)
    graphdef, state = first_state(config.name)
    state = layout.place(layout.to_memory(state))
    run = jax.jit(make_gradients(config, graphdef, layout))
    batch = put_batch(make_batch(), mesh, config.train.accumulate)
    grads, sums, aux = jax.device_get(run(state, batch, state.step))
    return named_leaves(layout.to_file(grads)), sums, aux


@functools.cache
def one_device(kind):
    return compute(make_config(kind))


def trace(config, layout=None):
    """The traced gradients of an experiment; nothing is compiled."""
    from uoe_jax.train.ahead import abstract_batch

    mesh = mesh_for(config)
    optimizer = make_optimizer(config.optim, 10)
    graphdef, state = abstract_state(config, optimizer, mesh)
    layout = layout or layout_of(config, mesh)
    run = jax.jit(make_gradients(config, graphdef, layout))
    return run.trace(state, abstract_batch(config, mesh), state.step).jaxpr
