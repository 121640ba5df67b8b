"""Heads beside those of a layer's kind: local, full and grouped ones."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compare import assert_close
from tests.model.test_cache import check_decoding
from tests.model.tiny_models import build, forward, shapes_of, tiny, tokens_like
from uoe_jax.config import HeadGroups, MobaConfig, UnionConfig, from_json, to_json
from uoe_jax.decompose.split import check_dense
from uoe_jax.errors import ConfigError
from uoe_jax.hardware.count import cache_bytes, count_params, flops_per_token
from uoe_jax.model import init_cache, make_model, param_shapes
from uoe_jax.model.capture import capture
from uoe_jax.model.head_groups import window_tokens
from uoe_jax.validation import validate_model
from uoe_jax.weights import model_params

GROUPS = HeadGroups(local=2, window=4, full=4, full_kv=1)
LAYERS = {
    "dense": {},
    "union": {"attention": ("union",), "mlp": ("union",)},
    "shared keys": {
        "attention": ("union",),
        "union": UnionConfig(num_experts=4, top_k=2, shared_kv=True),
    },
    "moh": {"attention": ("moh",)},
    "moba": {"attention": ("moba",), "moba": MobaConfig(block_size=3, top_k=2)},
    "family": {"qk_norm": True, "use_bias": True, "activation": "swiglu"},
    "post": {"norm_place": "post", "window": (5, 0)},
}


def test_a_dense_layer_cut_into_groups_is_the_dense_layer():
    """Window and length are equal, so that local heads see all there is."""
    dense = build(tiny(use_bias=True, qk_norm=True))
    groups = HeadGroups(local=2, window=12, full=2)
    config = tiny(
        use_bias=True, qk_norm=True, num_heads=4, num_kv_heads=2, head_groups=groups
    )
    weights = dict(nnx.to_flat_state(nnx.state(dense, nnx.Param)))
    heads = {
        "attention": slice(0, 2),
        "local_attention": slice(2, 3),
        "full_attention": slice(3, 4),
    }
    graphdef, params, rest = shapes_of(config)
    flat = []
    for path, variable in nnx.to_flat_state(params):
        part = next((name for name in heads if name in path), None)
        whole = tuple("attention" if step == part else step for step in path)
        value = np.asarray(weights[whole][...])
        if part and path[-1] in ("wq", "wk", "wv", "wo", "bq", "bk", "bv"):
            axis = 2 if path[-1] in ("wo", "bq", "bk", "bv") else 3
            value = value[(slice(None),) * axis + (heads[part],)]
        flat.append((path, variable.replace(jnp.asarray(value))))
    cut = nnx.merge(graphdef, nnx.from_flat_state(flat), rest)
    tokens = tokens_like(config, 2, 12, seed=1)
    segments = jnp.array([[1] * 7 + [2] * 5, [1] * 9 + [0] * 3])
    wanted = forward(dense, tokens, segments=segments)[0]
    found = forward(cut, tokens, segments=segments)[0]
    real = np.asarray(segments) > 0
    assert_close(np.asarray(found)[real], np.asarray(wanted)[real], 1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_decoding_equals_the_full_forward_with_a_cache_of_the_window(name):
    config = tiny(head_groups=GROUPS, **LAYERS[name])
    model = build(config)
    tokens = tokens_like(config, 3, 12, seed=1)
    lengths = jnp.array([6, 1, 4])  # over the window, under it, and the whole of it
    cache = init_cache(config, 3, 12)
    assert cache.layers[0]["local_attention"]["k"].shape[2:] == (4, 1, 8)
    assert cache.layers[0]["full_attention"]["k"].shape[2:] == (12, 1, 8)
    check_decoding(model, tokens, lengths, 6)


def test_every_row_of_a_full_ring_holds_the_last_token_of_its_number():
    draw = np.random.default_rng(0)
    for _ in range(50):
        rows, length = map(int, (draw.integers(1, 9), draw.integers(1, 30)))
        lengths = draw.integers(1, length + 1, 3)
        got = np.asarray(window_tokens(rows, jnp.asarray(lengths), length))
        for row, end in enumerate(lengths):
            for token in range(max(0, end - rows), end):
                assert got[row, token % rows] == token


def test_local_heads_see_their_window_and_no_more():
    config = tiny(num_layers=1, head_groups=HeadGroups(local=2, window=3))
    model = build(config)
    block = model.trunk.blocks[0]
    # Only the local heads write.
    block.attention.wo[...] = jnp.zeros_like(block.attention.wo[...])
    tokens = tokens_like(config, 1, 12, seed=2)
    changed = tokens.at[0, 4].set((tokens[0, 4] + 1) % 61)
    moved = jnp.abs(forward(model, tokens)[0] - forward(model, changed)[0])[0].max(-1)
    seen = np.flatnonzero(np.asarray(moved) > 1e-6)
    np.testing.assert_array_equal(seen, [4, 5, 6])


@pytest.mark.parametrize("name", LAYERS)
def test_the_counts_are_those_of_the_arrays(name):
    config = tiny(head_groups=GROUPS, **LAYERS[name])
    found = {key: leaf.shape for key, leaf in param_shapes(config).items()}
    assert found == {key: p.shape for key, p in model_params(config).items()}
    assert sum(count_params(config).values()) == sum(map(math.prod, found.values()))
    cache = init_cache(config, 2, 12)
    leaves = jax.tree_util.tree_leaves_with_path(cache.layers)
    keys = sum(leaf.nbytes for path, leaf in leaves if path[-1].key in ("k", "v"))
    assert cache_bytes(config, 2, 12) == keys
    parts = flops_per_token(config, 12).parts
    # Two local heads of one key head: the first three tokens see fewer than four.
    seen = (1 + 2 + 3 + 9 * 4) / 12
    assert_close(parts["local heads scores"], 2 * 2 * 2 * 16 * seen, 1e-6)
    assert parts["local heads projections"] == 2 * 2 * 32 * 16 * 3
    assert parts["full heads scores"] == 2 * 2 * 4 * 16 * 6.5
    assert parts["full heads projections"] == 2 * 2 * 32 * 16 * 5


def test_groups_write_together_as_much_as_dense_attention():
    """Eight heads of dense attention, or two and two and four beside them."""
    dense = tiny(d_model=256, num_layers=1, num_kv_heads=8)
    groups = HeadGroups(local=2, full=4)
    cut = dataclasses.replace(dense, num_heads=2, num_kv_heads=2, head_groups=groups)
    spread = []
    for config in (dense, cut):
        block = make_model(config, 0).trunk.blocks[0]
        parts = [block.attention, *(getattr(block, n) for n in block.groups)]
        spread.append(np.concatenate([np.ravel(part.wo[...]) for part in parts]).std())
    # 16,384 draws: the deviation of a deviation is 0.6%.
    assert abs(spread[1] / spread[0] - 1) < 0.04


@pytest.mark.parametrize(
    ("groups", "model", "problem"),
    [
        ({"local": 3}, {}, "local is 3 and 2 query heads share.*use 4"),
        ({"local": 4, "local_kv": 3}, {}, "local_kv is 3 and.*use one of 1, 2, 4"),
        ({"full_kv": 2}, {}, "full_kv is 2 and model.head_groups.full 0; leave it 0"),
        ({"local": 2}, {"kind": "encoder"}, "only a decoder has windows"),
        ({"full": 2}, {"blocks": ("mod",)}, "head_groups are set with 'mod' blocks"),
    ],
)
def test_groups_that_cannot_be_are_one_line(groups, model, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        validate_model(tiny(head_groups=HeadGroups(**groups), **model))
    assert "\n" not in str(caught.value) and ";" in str(caught.value)


def test_what_cuts_plain_layers_refuses_groups_and_an_encoder_has_full_heads():
    config = tiny(head_groups=GROUPS)
    assert from_json(to_json(config), type(config)) == config
    with pytest.raises(ConfigError, match="has model.head_groups"):
        check_dense(config)
    with pytest.raises(ConfigError, match="has model.head_groups"):
        capture(build(config))
    encoder = tiny(kind="encoder", head_groups=HeadGroups(full=2))
    tokens = tokens_like(encoder, 2, 8, seed=0)
    assert np.isfinite(forward(build(encoder), tokens)[0]).all()
