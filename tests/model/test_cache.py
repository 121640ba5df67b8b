"""Prefill and decode are the full forward pass, token by token; cache sizes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compare import assert_close
from tests.model.tiny_models import VARIANTS, build, forward, tiny, tokens_like, union
from uoe_jax.config import UnionConfig
from uoe_jax.errors import ConfigError
from uoe_jax.model import init_cache


@jax.jit
def prefill(model, tokens, lengths, cache):
    return model.prefill(tokens, lengths, cache)


@jax.jit
def decode(model, token, cache):
    return model.decode(token, cache)


def decoded_logits(model, tokens, lengths, steps):
    """Logits after each prompt and after each of `steps` tokens that follow it."""
    rows = jnp.arange(tokens.shape[0])
    cache = init_cache(model.config, tokens.shape[0], tokens.shape[1])
    logits, cache = prefill(model, tokens[:, : int(lengths.max())], lengths, cache)
    found = [logits]
    for step in range(steps):
        logits, cache = decode(model, tokens[rows, lengths + step], cache)
        found.append(logits)
    np.testing.assert_array_equal(cache.lengths, lengths + steps)
    return jnp.stack(found, axis=1)


def check_decoding(model, tokens, lengths, steps):
    """Decoding gives the logits of the forward pass, after prompts of any length."""
    wanted = forward(model, tokens)[0]
    found = decoded_logits(model, tokens, lengths, steps)
    for row, length in enumerate(np.asarray(lengths)):
        expected = wanted[row, length - 1 : length + steps]
        np.testing.assert_allclose(found[row], expected, atol=1e-4)


# The mixed model's MLP is a mixture of experts, too.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.both_jax if name == "mixed" else ())
        for name in VARIANTS
        if name != "moe"
    ],
)
def test_prefill_and_decode_equal_the_full_forward(name):
    model = build(VARIANTS[name])
    tokens = tokens_like(model.config, 2, 12, seed=1)
    lengths = jnp.array([6, 1])  # at a patch's end and inside one
    full, _ = forward(model, tokens)
    found = decoded_logits(model, tokens, lengths, 6)
    for row, length in enumerate(np.asarray(lengths)):
        expected = full[row, length - 1 : length + 6]
        np.testing.assert_allclose(found[row], expected, atol=1e-4)


def test_decode_applies_the_gate_and_a_looped_trunk():
    parts = UnionConfig(num_experts=4, top_k=2, gate="softmax", patch_size=4)
    config = union(union=parts, scan_layers=False)
    model = build(config)
    tokens = tokens_like(config, 2, 12, seed=2)
    full, _ = forward(model, tokens)
    found = decoded_logits(model, tokens, jnp.array([3, 5]), 4)
    np.testing.assert_allclose(found[0], full[0, 2:7], atol=1e-4)
    np.testing.assert_allclose(found[1], full[1, 4:9], atol=1e-4)


def test_padding_after_a_prompt_does_not_reach_it():
    model = build(VARIANTS["union-patch"])
    tokens = tokens_like(model.config, 2, 12, seed=3)
    other = tokens_like(model.config, 2, 12, seed=4)
    lengths = jnp.array([5, 5])
    real = jnp.arange(6)[None] < 5
    tokens, other = tokens[:, :6], other[:, :6]
    results = []
    for padded in (tokens, jnp.where(real, tokens, other)):
        cache = init_cache(model.config, 2, 12)
        logits, cache = prefill(model, padded, lengths, cache)
        results.append((logits, decode(model, tokens[:, 0], cache)[0]))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.both_jax
def test_union_cache_has_exactly_the_kept_share_of_the_dense_bytes():
    options = {"num_layers": 3, "union": UnionConfig(num_experts=4, top_k=3)}
    size = lambda cache: sum(e[n].nbytes for e in cache.layers for n in ("k", "v"))
    dense = size(init_cache(tiny(**options), 2, 16))
    assert dense == 2 * 3 * 2 * 16 * 4 * 8 * 4
    routed = init_cache(union(**options), 2, 16)
    assert size(routed) * 4 == dense * 3
    assert routed.layers[0]["k"].shape == (3, 2, 16 * 3, 1, 8)
    assert size(init_cache(tiny(**options), 2, 16, "bfloat16")) * 2 == dense


def test_decoding_does_not_recompile():
    model = build(VARIANTS["union"])
    tokens = tokens_like(model.config, 2, 6, seed=5)
    _, cache = prefill(
        model, tokens, jnp.array([4, 6]), init_cache(model.config, 2, 12)
    )
    chex.clear_trace_counter()
    once = jax.jit(chex.assert_max_traces(decode.__wrapped__, n=1))
    for step in range(4):
        before = cache
        _, cache = once(model, tokens[:, step], cache)
        chex.assert_trees_all_equal_shapes_and_dtypes(before, cache)


@pytest.mark.both_jax
def test_only_decoders_have_a_cache():
    with pytest.raises(ConfigError, match="'encoder'; only a decoder"):
        init_cache(tiny(kind="encoder"), 1, 4)
