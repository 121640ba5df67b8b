"""Weights as decoding holds them: of eight bits, and bfloat16 on a CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.model.test_decoding import CONFIGS
from tests.model.tiny_models import build, tokens_like
from uoe_jax.config import ModelConfig, UnionConfig
from uoe_jax.generate import generate, stream
from uoe_jax.model import init_cache, make_model
from uoe_jax.model.decoding.step import (
    Addition,
    OwnPart,
    Projection,
    is_product,
    prepare,
    product_bytes,
    with_decode_weights,
)


def in_float32(decoder):
    """A decoder whose weights of eight bits are written out again."""

    def change(part):
        if not is_product(part) or part.scales is None:
            return part
        weight = part.weight.astype(jnp.float32) * part.scales[..., None]
        return dataclasses.replace(part, weight=weight, scales=None)

    return jax.tree.map(change, decoder, is_leaf=is_product)


@jax.jit
def nll_by_decoding(decoder, tokens, cache):
    """Mean loss of tokens [B, T] (nats), each predicted by a decoded step."""

    def step(cache, pair):
        logits, cache = decoder.decode(pair[0], cache)
        return cache, optax.softmax_cross_entropy_with_integer_labels(logits, pair[1])

    pairs = (tokens[:, :-1].T, tokens[:, 1:].T)
    return jnp.mean(jax.lax.scan(step, cache, pairs)[1])


@pytest.mark.parametrize("name", ["dense", "post-norm", "union", "few of many", "moe"])
@pytest.mark.parametrize("looped", [True, False])
def test_a_step_of_eight_bits_is_that_of_the_weights_they_stand_for(name, looped):
    model = with_decode_weights(build(CONFIGS[name]), "int8")
    decoder = prepare(model, 2, looped)
    parts = [p for p in jax.tree.leaves(decoder, is_leaf=is_product) if is_product(p)]
    assert {type(p) for p in parts} == {Projection, Addition}
    assert all(p.weight.dtype == jnp.int8 for p in parts)
    assert not any(isinstance(p, OwnPart) for p in decoder.layers)
    tokens = tokens_like(model.config, 2, 6, seed=1)
    step = jax.jit(lambda decoder, token, cache: decoder.decode(token, cache))
    found = []
    for form in (decoder, in_float32(decoder)):
        cache, logits = init_cache(model.config, 2, 6), []
        for number in range(6):
            out, cache = step(form, tokens[:, number], cache)
            logits.append(np.asarray(out))
        found.append(np.stack(logits))
    np.testing.assert_allclose(
        found[0], found[1], rtol=0, atol=1e-5 * np.abs(found[1]).max()
    )


def test_a_quarter_of_float32s_bytes_is_read():
    model = make_model(ModelConfig(), jax.random.key(0))
    whole = product_bytes(prepare(model, 1))
    few = product_bytes(prepare(with_decode_weights(model, "int8"), 1))
    assert model.decode_weights == "compute"  # a copy was changed
    # And 4 bytes for each output: of 128 or more inputs.
    assert 1 / 4 < few / whole <= 1 / 4 + 1 / 128


def test_a_cpu_holds_rounded_weights_in_float32():
    config = dataclasses.replace(CONFIGS["union"], compute_dtype="bfloat16")
    decoder = prepare(build(config), 2)
    parts = [p for p in jax.tree.leaves(decoder, is_leaf=is_product) if is_product(p)]
    for part in parts:
        assert part.weight.dtype == jnp.float32
        rounded = part.weight.astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(part.weight, rounded)
    narrow = jax.tree.map(
        lambda p: (
            jax.tree.map(lambda a: a.astype(jnp.bfloat16), p) if is_product(p) else p
        ),
        decoder,
        is_leaf=is_product,
    )
    tokens, cache = tokens_like(config, 2, 1, seed=1), init_cache(config, 2, 4)
    step = jax.jit(lambda decoder: decoder.decode(tokens[:, 0], cache)[0])
    want = np.asarray(step(narrow))
    atol = 2.0**-7 * np.abs(want).max()
    np.testing.assert_allclose(step(decoder), want, rtol=0, atol=atol)


def test_tokens_are_the_same_streamed_or_at_once():
    model = with_decode_weights(build(CONFIGS["union"]), "int8")
    tokens = tokens_like(model.config, 2, 5, seed=3)
    lengths = jnp.array([5, 3])
    whole = np.asarray(generate(model, tokens, lengths, 4, greedy=True))
    streamed = list(stream(model, tokens, lengths, 4, greedy=True))
    np.testing.assert_array_equal(np.stack(streamed, axis=1), whole)


def test_a_trained_model_loses_little():
    """Learnt: a walk of 31 letters with a few ways on from each."""
    config = ModelConfig(
        vocab_size=31, max_seq_len=48, d_model=32, d_ff=64, num_layers=2, num_heads=4,
        num_kv_heads=4, head_dim=8, attention=("union",), mlp=("union",),
        union=UnionConfig(num_experts=4, top_k=2),
    )  # fmt: skip
    draw = np.random.default_rng(0)
    ways = np.stack([draw.permutation(31) for _ in range(3)])

    def texts(count):
        rows = [draw.integers(0, 31, count)]
        for _ in range(47):
            way = draw.choice(3, count, p=[0.7, 0.2, 0.1])
            rows.append(ways[way, rows[-1]])
        return jnp.asarray(np.stack(rows, axis=1), jnp.int32)

    model = make_model(config, jax.random.key(0))
    optimizer = optax.adam(3e-3)

    @jax.jit
    def train(model, state, tokens):
        def loss(model):
            logits, _ = model(tokens[:, :-1])
            each = optax.softmax_cross_entropy_with_integer_labels
            return jnp.mean(each(logits, tokens[:, 1:]))

        value, grads = jax.value_and_grad(loss, allow_int=True)(model)
        floats = lambda g, p: g if jnp.issubdtype(p.dtype, jnp.floating) else None
        grads = jax.tree.map(floats, grads, model)
        updates, state = optimizer.update(grads, state)
        step = lambda p, u: p if u is None else p + u
        none = lambda x: x is None
        return jax.tree.map(step, model, updates, is_leaf=none), state, value

    state = optimizer.init(model)
    for _ in range(120):
        model, state, _ = train(model, state, texts(32))
    tokens, cache = texts(16), init_cache(config, 16, 48)
    losses = [
        float(nll_by_decoding(prepare(m, 16), tokens, cache))
        for m in (model, with_decode_weights(model, "int8"))
    ]
    assert losses[0] < 1.3  # of log 31 = 3.43; the least is 0.80
    assert abs(losses[1] - losses[0]) < 0.01
    assert losses[1] != losses[0]
