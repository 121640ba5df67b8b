"""Models whose products have operands of eight bits on the way forward."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.model.tiny_models import VOCAB, build, forward, tiny, tokens_like
from uoe_jax.config import HeadGroups, LayerWidths, MoeConfig, UnionConfig
from uoe_jax.errors import ConfigError
from uoe_jax.model.context import make_context
from uoe_jax.model.transformer import init_cache
from uoe_jax.ops.float8 import float8_products
from uoe_jax.validation import validate_model

SIDES = {
    "d_ff": 64,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 16,
    "compute_dtype": "bfloat16",
    "num_layers": 1,
}
UNION = UnionConfig(num_experts=4, top_k=2)
KINDS = {
    "dense, mixture": tiny(**SIDES, mlp=("moe",)),
    "union": tiny(
        **SIDES, attention=("union",), mlp=("union",), activation="swiglu", union=UNION
    ),
}
STEPS = 150


def losses(config, seed):
    """The loss at each step on fresh walks, whose entropy is log 3 a token."""
    model = build(config)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    rng = np.random.default_rng(seed)
    walks = rng.integers(0, 3, size=(STEPS, 16, 17)).cumsum(axis=2)
    texts = jnp.asarray((walks + rng.integers(99, size=(STEPS, 16, 1))) % VOCAB)
    optimizer = optax.adam(1e-2)

    def loss(params, tokens):
        logits = nnx.merge(graph, params, rest)(tokens[:, :-1])[0]
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, tokens[:, 1:]
        ).mean()

    @jax.jit
    def train(params):
        def step(carry, tokens):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, tokens)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        start = params, optimizer.init(params)
        return jax.lax.scan(step, start, texts)[1]

    return np.asarray(train(params))


@pytest.mark.parametrize(
    ("name", "scales"), [("dense, mixture", "tensor"), ("union", "rows")]
)
def test_a_model_learns_as_in_bfloat16(name, scales):
    """To 0.02 nats a token, of 1.2 at the end; log 3 is the walks' own."""
    plain, rounded = (
        losses(dataclasses.replace(KINDS[name], float8=scale), seed=0)
        for scale in ("none", scales)
    )
    assert plain[0] != rounded[0] and abs(plain[0] - rounded[0]) < 0.05
    end = [float(each[-30:].mean()) for each in (plain, rounded)]
    assert end[0] < 1.25 and abs(end[0] - end[1]) < 0.02


@pytest.mark.parametrize("name", KINDS)
def test_tokens_are_generated_in_the_compute_dtype(name):
    """Prompts and new tokens alike: rounding serves the forward pass of training."""
    config = dataclasses.replace(KINDS[name], output_gate=True)
    models = [
        build(dataclasses.replace(config, float8=scale)) for scale in ("none", "rows")
    ]
    tokens = tokens_like(config, 2, 9, seed=1)
    prompts = []
    for model in models:
        cache = init_cache(model.config, 2, 16)
        prompts.append(model.prefill(tokens, jnp.array([9, 4]), cache)[0])
    np.testing.assert_array_equal(*prompts)
    whole = [np.asarray(forward(model, tokens)[0]) for model in models]
    assert 1e-4 < np.abs(whole[0] - whole[1]).max() < 0.1 * np.abs(whole[0]).max()


@pytest.mark.parametrize(("scales", "same"), [("rows", True), ("tensor", False)])
@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_with_a_scale_a_row_a_token_sees_none_behind_it(part, scales, same):
    """A tensor's scale is of all tokens: one far above the others rounds them to 0.

    Only a factor above the range of e4m3's normal numbers shows in scales, which are
    powers of two.
    """
    block = build(KINDS["union"]).trunk.blocks[0]
    layer = jax.tree.map(lambda a: a[0], getattr(block, part))
    x = jax.random.normal(jax.random.key(3), (1, 12, 32), jnp.bfloat16)
    context = make_context(KINDS["union"], (1, 12))
    with float8_products(scales):
        before, after = (
            np.asarray(layer(each, context)[0][:, :8], np.float32)
            for each in (x, x.at[0, 8].multiply(2.0**16))
        )
    assert np.isfinite(after).all()
    off = np.abs(before - after).max() / np.abs(before).max()
    assert off == 0 if same else off > 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compute_dtype": "float32"}, "compute_dtype 'float32'"),
        ({"d_model": 40}, "model.d_model is 40; .* use 48 or model.float8 none"),
        ({"head_dim": 2}, "key heads are together 8; "),
        ({"attention": ("union",), "head_dim": 8}, "expert are together 8; .* use 16"),
        ({"mlp": ("union",), "d_ff": 96}, "model.d_ff of an expert is 24; "),
        ({"mlp": ("moe",), "moe": MoeConfig(d_expert=40)}, "d_expert is 40; "),
        ({"widths": LayerWidths(d_ff=(48,))}, "model.widths are set"),
        (
            {
                "head_groups": HeadGroups(local=1, window=4),
                "head_dim": 8,
                "num_heads": 4,
                "num_kv_heads": 4,
            },
            "heads of model.head_groups.local are together 8; ",
        ),
    ],
)
def test_weights_that_cannot_take_it_are_refused(changes, words):
    config = tiny(**(SIDES | {"float8": "tensor", "union": UNION} | changes))
    with pytest.raises(ConfigError, match=words) as found:
        validate_model(config)
    assert str(found.value).count("model.float8 is") == 1
