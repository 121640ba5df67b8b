"""Fields of imported families: windows, norms of heads, scaled rotation, post norms."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compare import assert_close
from tests.model.test_cache import decoded_logits
from tests.model.tiny_models import build, forward, split_model, tiny, tokens_like
from uoe_jax.config import (
    ExperimentConfig,
    MoeConfig,
    RopeScaling,
    UnionConfig,
    UnionOverrides,
)
from uoe_jax.errors import ConfigError
from uoe_jax.hardware.count import flops_per_token
from uoe_jax.leakcheck import leakcheck
from uoe_jax.model import make_model
from uoe_jax.model.mlp import activate
from uoe_jax.ops.rotary import cosines_and_sines
from uoe_jax.validation import validate

LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_max_seq_len=16)
QWEN = {"qk_norm": True, "attention_bias": "qkv", "activation": "swiglu"}
UNION = {"attention": ("union",), "mlp": ("union",)}
FAMILIES = {
    "qwen": QWEN,
    "window": {"window": (5, 0), "num_layers": 3, "rope_scaling": LLAMA3},
    "post": {
        "norm_place": "post",
        "norm": "layernorm",
        "embed_norm": True,
        "token_types": 2,
        "position": "learned",
        "activation": "gelu_erf",
    },
    "union qwen": QWEN | UNION,
    "union window": UNION | {"window": (5,), "rope_scaling": LLAMA3},
    "union post": UNION | {"norm_place": "post", "window": (5,)},
    "shared keys": UNION
    | QWEN
    | {
        "window": (5,),
        "union": UnionConfig(num_experts=4, top_k=2, shared_kv=True),
    },
    "moh": {"attention": ("moh",), "window": (5,)} | QWEN,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_and_decode_equal_the_full_forward_and_nothing_leaks(name):
    model = build(tiny(**FAMILIES[name]))
    tokens = tokens_like(model.config, 2, 12, seed=1)
    lengths = jnp.array([6, 1])
    full, _ = forward(model, tokens)
    found = decoded_logits(model, tokens, lengths, 6)
    for row, length in enumerate(np.asarray(lengths)):
        expected = full[row, length - 1 : length + 6]
        np.testing.assert_allclose(found[row], expected, atol=1e-4)
    if name in ("union window", "union qwen", "window"):
        assert all(f.passed for f in leakcheck(model, jax.random.key(0), length=12))


@pytest.mark.parametrize("name", ["qwen", "window", "post"])
def test_all_experts_with_unit_gates_are_the_dense_model(name):
    options = FAMILIES[name] | {"union": UnionConfig(num_experts=4, top_k=4)}
    dense = build(tiny(**options))
    parts = split_model(dense, tiny(**options, **UNION))
    tokens = tokens_like(tiny(), 2, 12, seed=1)
    segments = jnp.array([[1] * 7 + [2] * 5, [1] * 9 + [0] * 3])
    expected, found = (
        forward(model, tokens, segments=segments)[0] for model in (dense, parts)
    )
    np.testing.assert_allclose(
        np.where(segments[..., None] > 0, found, 0),
        np.where(segments[..., None] > 0, expected, 0),
        atol=1e-5,
    )


@pytest.mark.parametrize("name", ["window", "union window", "shared keys", "moh"])
def test_a_token_before_every_window_moves_nothing(name):
    """Two layers of windows of 5 reach 8 tokens back, whoever is in the expert."""
    config = tiny(**{**FAMILIES[name], "window": (5,), "num_layers": 2})
    model = build(config)
    tokens = tokens_like(config, 1, 14, seed=5)
    other = tokens.at[0, 2].set((tokens[0, 2] + 1) % config.vocab_size)
    (a, aux), (b, _) = forward(model, tokens), forward(model, other)
    del aux
    np.testing.assert_allclose(a[0, 11:], b[0, 11:], atol=1e-6)
    assert np.abs(a[0, 2:6] - b[0, 2:6]).max() > 1e-3


def test_queries_and_keys_are_normalised_head_by_head():
    model = build(tiny(**QWEN, num_layers=1))
    block = jax.tree.map(lambda a: a[0], model.trunk.blocks[0])
    x = jax.random.normal(jax.random.key(0), (3, 32))
    q, k, _ = block.attention.project_qkv(x, jnp.zeros(3, int))
    for heads in (q, k):
        np.testing.assert_allclose(jnp.mean(heads**2, -1), 1, atol=1e-4)


def test_llama3_stretches_long_waves_whole_and_short_ones_not():
    theta, width = 500_000.0, 8
    cos, sin = cosines_and_sines(jnp.arange(3), width, theta, LLAMA3)
    for i in range(width // 2):
        plain = theta ** (-2 * i / width)
        wave = 2 * math.pi / plain
        if wave > 16 / 1.0:
            wanted = plain / 8
        elif wave < 16 / 4.0:
            wanted = plain
        else:
            share = (16 / wave - 1.0) / 3.0
            wanted = (1 - share) * plain / 8 + share * plain
        np.testing.assert_allclose(cos[2, i], math.cos(2 * wanted), atol=1e-6)
        np.testing.assert_allclose(sin[2, i], math.sin(2 * wanted), atol=1e-6)


def test_linear_scaling_divides_positions():
    scaling = RopeScaling(kind="linear", factor=4.0)
    stretched = cosines_and_sines(jnp.arange(9), 8, 1e4, scaling)
    plain = cosines_and_sines(jnp.arange(3), 8, 1e4)
    for a, b in zip(stretched, plain, strict=True):
        np.testing.assert_allclose(a[::4], b, atol=1e-6)


def test_the_two_forms_of_gelu_are_those_of_their_equations():
    x = np.linspace(-4, 4, 41).astype(np.float32)
    erf = np.array([0.5 * v * (1 + math.erf(v / 2**0.5)) for v in x.tolist()])
    inner = (2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)
    np.testing.assert_allclose(activate(jnp.array(x), None, True), erf, atol=1e-6)
    np.testing.assert_allclose(
        activate(jnp.array(x), None), 0.5 * x * (1 + np.tanh(inner)), atol=1e-6
    )


def test_mlp_experts_use_the_gelu_that_the_config_names():
    config = tiny(mlp=("union",), activation="gelu_erf", num_layers=1)
    tokens = tokens_like(config, 2, 8, seed=2)
    logits = forward(build(config), tokens)[0]
    tanh = forward(build(dataclasses.replace(config, activation="gelu")), tokens)[0]
    assert 1e-6 < np.abs(logits - tanh).max() < 1e-2


def test_an_encoder_gives_tokens_classes_or_hidden_states():
    base = tiny(
        kind="encoder", num_classes=3, pooling="tanh", token_types=2, num_layers=1
    )
    tokens = tokens_like(base, 2, 6, seed=3)
    shapes = {"classes": (2, 3), "tokens": (2, 6, 61), "none": (2, 6, 32)}
    for head, shape in shapes.items():
        model = make_model(
            dataclasses.replace(base, encoder_head=head), jax.random.key(0)
        )
        assert model(tokens)[0].shape == shape
    types = jnp.array([[0] * 3 + [1] * 3] * 2)
    plain, typed = model(tokens)[0], model(tokens, token_types=types)[0]
    assert np.abs(plain - typed).max() > 1e-3
    assert_close(model(tokens, token_types=0 * types)[0], plain, 1e-6)
    with pytest.raises(ConfigError, match="token_types holds 2 beside 2 types"):
        model(tokens, token_types=types * 2)


def test_a_class_token_stands_before_the_patches():
    config = tiny(kind="vision", class_token=True, pooling="first", position="learned")
    model = build(config)
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    x = model.embed(images)
    assert x.shape == (2, 17, 32)
    first = model.embed.class_token[...] + model.embed.position.embedding[...][0]
    np.testing.assert_allclose(x[:, 0], np.broadcast_to(first, (2, 32)), atol=1e-6)
    assert all(f.passed for f in leakcheck(model, jax.random.key(0)))


@pytest.mark.parametrize("window", [1, 3, 8, 20])
def test_keys_seen_in_a_window_are_counted_one_by_one(window):
    config, length = tiny(window=(window, 0)), 8
    seen = sum(min(t + 1, window) for t in range(length)) / length
    whole = (length + 1) / 2
    scores = flops_per_token(config, length).parts["attention scores"]
    assert abs(scores - 4 * 8 * 8 * (seen + whole)) < 1e-6 * scores


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"window": (4,), "attention": ("moba",)}, "'moba' attention, which chooses"),
        ({"window": (4,), "blocks": ("mod",)}, "with 'mod' blocks, in which"),
        ({"window": (4,), "kind": "encoder"}, "only a decoder has windows, use 0"),
        ({"window": (0, 1, 2)}, "model.window has 3 kinds for 2 layers"),
        (
            {"rope_scaling": LLAMA3, "position": "learned"},
            "only rotary positions are scaled, use none",
        ),
        (
            {"rope_scaling": dataclasses.replace(LLAMA3, low_freq_factor=4.0)},
            "the second must be the larger one",
        ),
        ({"norm_place": "post", "blocks": ("mod",)}, "whose tokens go around norms"),
        ({"class_token": True}, "model.class_token is True and model.kind 'decoder'"),
        ({"encoder_head": "tokens"}, "model.encoder_head is 'tokens' and model.kind"),
        ({"pooling": "first"}, "model.pooling is 'first' and model.kind 'decoder'"),
        ({"pooling": "tanh", "kind": "vision"}, "model.pooling is 'tanh'"),
        ({"token_types": 2, "kind": "vision"}, "model.token_types is 2"),
    ],
)
def test_fields_that_do_not_fit_are_refused_in_one_line(changes, rule):
    model = tiny(vocab_size=256, moe=MoeConfig(), **changes)
    model = dataclasses.replace(model, union_attention=UnionOverrides())
    with pytest.raises(ConfigError, match=rule):
        validate(ExperimentConfig(model=model))
