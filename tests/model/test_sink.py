"""Sinks: a learned logit a head in the softmax's denominator."""

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
from uoe_jax.config import HeadGroups, LayerWidths, UnionConfig
from uoe_jax.errors import ConfigError
from uoe_jax.hardware.count import count_params, flops_per_token
from uoe_jax.model import param_shapes
from uoe_jax.model.context import make_context
from uoe_jax.optim import decay_mask
from uoe_jax.validation import validate_model
from uoe_jax.weights import model_params

UNION = {"attention": ("union",), "mlp": ("union",)}
LAYERS = {
    "dense": {"head_groups": HeadGroups(local=2, window=4)},
    "grouped keys": {"num_kv_heads": 2},
    "union": UNION | {"union": UnionConfig(num_experts=4, top_k=2, patch_size=2)},
    "two heads an expert": UNION
    | {"union": UnionConfig(num_experts=2, top_k=1, gated_values=True)},
    "narrow": {"widths": LayerWidths(key_dim=(4, 6), value_dim=(3, 8))},
    "threshold": UNION | {"union": UnionConfig(num_experts=4, router="threshold")},
    "mod": {"blocks": ("all", "mod")},
}


def drawn(config, size=1.0):
    """A model whose sinks are drawn, which start at 0."""

    def draw(path, variable):
        if path[-1] != "sink":
            return variable
        rng = np.random.default_rng(len(path))
        return variable.replace(jnp.asarray(rng.normal(0, size, variable.shape)))

    graphdef, params, rest = nnx.split(build(config), nnx.Param, ...)
    flat = [(path, draw(path, v)) for path, v in nnx.to_flat_state(params)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat), rest)


@pytest.mark.parametrize("name", LAYERS)
def test_decoding_equals_the_full_forward(name):
    model = drawn(tiny(sink=True, **LAYERS[name]))
    tokens = tokens_like(model.config, 2, 12, seed=1)
    lengths = jnp.array([6, 1])
    check_decoding(model, tokens, lengths, 6)


@pytest.mark.parametrize("kind", ["dense", "union"])
def test_far_below_all_scores_it_is_the_model_without_it(kind):
    config = tiny(attention=(kind,), sink=True)
    _, params, rest = nnx.split(build(config), nnx.Param, ...)
    flat = nnx.to_flat_state(params)
    ends = [
        (path, v.replace(jnp.full(v.shape, -60.0)) if path[-1] == "sink" else v)
        for path, v in flat
    ]
    model = nnx.merge(shapes_of(config)[0], nnx.from_flat_state(ends), rest)
    others = [(path, v) for path, v in flat if path[-1] != "sink"]
    graphdef = shapes_of(dataclasses.replace(config, sink=False))[0]
    plain = nnx.merge(graphdef, nnx.from_flat_state(others), rest)
    tokens = tokens_like(config, 2, 12, seed=1)
    assert_close(forward(model, tokens)[0], forward(plain, tokens)[0], 1e-6)
    started = [(p, v.replace(v * 0) if p[-1] == "sink" else v) for p, v in flat]
    model = nnx.merge(shapes_of(config)[0], nnx.from_flat_state(started), rest)
    moved = forward(model, tokens)[0] - forward(plain, tokens)[0]
    assert np.abs(moved).max() > 0.01


def test_a_sink_takes_its_share_of_what_a_head_reads():
    """Dense heads by hand: the output is scaled by 1 - p of the sink."""
    config = tiny(num_layers=1, sink=True)
    block = drawn(config, size=2.0).trunk.blocks[0]
    layer = jax.tree.map(lambda a: a[0], block.attention)
    x = jax.random.normal(jax.random.key(0), (2, 7, 32))
    context = make_context(config, (2, 7))
    parts = [np.asarray(a, np.float64) for a in layer.project_qkv(x, context.positions)]
    q, k, v = parts[0], *(a.repeat(2, axis=2) for a in parts[1:])  # two share a key
    scores = np.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    weights = np.exp(scores) * np.tril(np.ones((7, 7)))
    sink = np.exp(np.asarray(layer.sink[...], np.float64)).reshape(1, -1, 1, 1)
    weights = weights / (weights.sum(-1, keepdims=True) + sink)
    wanted = np.einsum("bnts,bsnh->btnh", weights, v)
    assert_close(layer.attend_heads(x, context)[0], wanted, 1e-5)
    assert weights.sum(-1).std() > 0.1


def test_the_counts_are_those_of_the_arrays_and_it_isnt_decayed():
    config = tiny(sink=True, **UNION)
    shapes = param_shapes(config)
    found = {key: leaf.shape for key, leaf in shapes.items()}
    assert found == {key: p.shape for key, p in model_params(config).items()}
    assert sum(count_params(config).values()) == sum(map(math.prod, found.values()))
    assert flops_per_token(config, 12) == flops_per_token(tiny(**UNION), 12)
    sinks = [name for name in found if name.endswith(".sink")]
    assert sinks and not any(decay_mask({name: 0})[name] for name in sinks)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"attention": ("moba",)}, "model.attention has 'moba', which has none"),
        (UNION | {"union": UnionConfig(num_experts=4, shared_kv=True)}, "shared_kv"),
    ],
)
def test_attention_without_sinks_refuses_them(changed, said):
    with pytest.raises(ConfigError, match=said):
        validate_model(tiny(sink=True, **changed))
