"""Small models, batches and the exact dense <-> union weight map for these tests."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uoe_jax.config import ModelConfig, MoeConfig, UnionConfig, UnionOverrides
from uoe_jax.model import make_model

VOCAB = 61


def tiny(**changes: Any) -> ModelConfig:
    base = ModelConfig(
        vocab_size=VOCAB,
        max_seq_len=32,
        d_model=32,
        d_ff=64,
        num_layers=2,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
        union=UnionConfig(num_experts=4, top_k=2),
        moe=MoeConfig(num_experts=4, top_k=2),
    )
    return dataclasses.replace(base, **changes)


def union(**changes: Any) -> ModelConfig:
    return tiny(attention=("union",), mlp=("union",), **changes)


# A dense model, both unions, a mixture, and patterns with a layer left over.
VARIANTS = {
    "dense": tiny(),
    "union": union(),
    "union-patch": union(
        union=UnionConfig(num_experts=2, top_k=1, patch_size=3), use_bias=True
    ),
    "key-router": union(
        union_attention=UnionOverrides(gated_values=True, key_router=True),
        qk_norm=True,
        use_bias=True,
    ),
    "moe": tiny(mlp=("moe",), activation="swiglu"),
    "mixed": tiny(
        num_layers=3,
        attention=("dense", "union"),
        mlp=("moe", "union"),
        moe=MoeConfig(num_experts=5, top_k=3, d_expert=21),
        norm="layernorm",
        position="learned",
        tie_embeddings=False,
    ),
}


def shapes_of(config: ModelConfig) -> tuple[Any, Any, Any]:
    """A model's parts without its arrays: tests fill them in without compiling."""
    shapes = jax.eval_shape(lambda: make_model(config, jax.random.key(0)))
    return nnx.split(shapes, nnx.Param, ...)


def zeros_like(state: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), state
    )


@functools.cache
def build(config: ModelConfig, seed: int = 0) -> Any:
    """A model whose routers choose clearly and whose biases are not zero."""
    graphdef, params, buffers = shapes_of(config)
    draw = np.random.default_rng(seed)
    flat = []
    for path, variable in nnx.to_flat_state(params):
        name, spread = path[-1], 0.18  # about d_model ** -0.5
        if "router" in path:
            spread = 0.5
        elif name.startswith("b"):
            spread = 0.1
        elif name in ("wo", "w_down"):
            spread = 0.06
        elif name == "scale":
            spread = 0.0
        value = float(name == "scale") + spread * draw.normal(size=variable.shape)
        value = jnp.asarray(value.astype(variable.dtype))
        flat.append((path, variable.replace(value)))
    rest = nnx.to_flat_state(zeros_like(buffers))
    # A head keeps no pair twice: the first ones.
    rest = [
        (path, v.replace(v + jnp.arange(v.shape[-1], dtype=v.dtype)[None, None]))
        if path[-1] == "rotary_pairs"
        else (path, v)
        for path, v in rest
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat), nnx.from_flat_state(rest))


def tokens_like(config: ModelConfig, batch: int, length: int, seed: int) -> jax.Array:
    draw = np.random.default_rng(seed)
    return jnp.asarray(draw.integers(0, config.vocab_size, (batch, length)))


@jax.jit
def forward(model: Any, inputs: jax.Array, **options: Any) -> Any:
    """One compilation for each config and shape: the tests share their shapes."""
    return model(inputs, collect_choices=True, **options)


def split_weights(dense: Any, num_experts: int) -> dict[tuple, jax.Array]:
    """A dense model's weights cut into experts, by path; exact, as it only reshapes."""

    def cut(value: jax.Array, axis: int) -> jax.Array:
        value = np.asarray(value)[:, 0]  # [layers, 1, ...]: the one dense expert
        shape = value.shape
        width = shape[axis] // num_experts
        value = value.reshape(*shape[:axis], num_experts, width, *shape[axis + 1 :])
        return jnp.asarray(np.moveaxis(value, axis, 1))

    # The axis, past the layers, along which a weight's experts lie.
    axes = {"wq": 2, "wk": 2, "wv": 2, "wo": 1, "bq": 1, "bk": 1, "bv": 1}
    axes |= {"w_up": 2, "w_gate": 2, "w_down": 1, "b_up": 1, "b_gate": 1}
    flat = nnx.to_flat_state(nnx.state(dense, nnx.Param))
    return {
        path: cut(value[...], axes[path[-1]]) if path[-1] in axes else value[...]
        for path, value in flat
    }


def split_model(dense: Any, config: ModelConfig) -> Any:
    """The union with a dense model's weights and routers of zeros: every gate is 1."""
    graphdef, params, buffers = shapes_of(config)
    weights = split_weights(dense, config.union.num_experts)
    flat = []
    for path, variable in nnx.to_flat_state(params):
        value = weights.get(path)
        if value is None:
            assert "router" in path
            value = jnp.asarray(np.zeros(variable.shape, variable.dtype))
        assert value.shape == variable.shape, path
        flat.append((path, variable.replace(value)))
    return nnx.merge(graphdef, nnx.from_flat_state(flat), zeros_like(buffers))


def assert_is_dense_when_cut(config: ModelConfig) -> None:
    """A union of all experts with gates of 1 is its dense model, in two documents."""
    dense = build(tiny())
    tokens = tokens_like(config, 2, 12, seed=1)
    segments = jnp.array([[1] * 7 + [2] * 5, [1] * 9 + [0] * 3])
    wanted, found = (
        forward(model, tokens, segments=segments)[0]
        for model in (dense, split_model(dense, config))
    )
    real = np.asarray(segments) > 0
    np.testing.assert_allclose(
        np.asarray(found)[real], np.asarray(wanted)[real], atol=1e-4
    )
