"""Weights laid out for decoding: every form of a step is the full forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model.tiny_models import VARIANTS, build, forward, tiny, tokens_like, union
from uoe_jax.config import MoeConfig, UnionConfig
from uoe_jax.model import init_cache
from uoe_jax.model.decoding import routing
from uoe_jax.model.decoding.step import OwnPart, prepare

ROWS, LENGTH, STEPS = 3, 7, 3

CONFIGS = {
    "dense": tiny(activation="swiglu", qk_norm=True, window=(4,)),
    "post-norm": tiny(norm_place="post", norm="layernorm", use_bias=True),
    "union": union(union=UnionConfig(num_experts=4, top_k=2, gate="softmax")),
    "few of many": union(union=UnionConfig(num_experts=8, top_k=1), num_kv_heads=8),
    "always on": union(union=UnionConfig(num_experts=4, top_k=2, num_shared=1)),
    "shared keys": union(
        union=UnionConfig(num_experts=4, top_k=2, shared_kv=True), qk_norm=True
    ),
    "moe": tiny(
        mlp=("moe",), moe=MoeConfig(num_experts=6, top_k=2, gate="sigmoid", d_expert=24)
    ),
    "left over": VARIANTS["mixed"],
}


def logits_of(model, decoder, tokens, lengths):
    """Logits after each of STEPS tokens that follow prompts of `lengths`."""
    rows = jnp.arange(tokens.shape[0])
    cache = init_cache(model.config, tokens.shape[0], LENGTH + STEPS)
    _, cache = jax.jit(lambda m, t, n, c: m.prefill(t, n, c))(
        model, tokens[:, :LENGTH], lengths, cache
    )
    step = jax.jit(lambda decoder, token, cache: decoder.decode(token, cache))
    found = []
    for number in range(STEPS):
        logits, cache = step(decoder, tokens[rows, lengths + number], cache)
        found.append(logits)
    return jnp.stack(found, axis=1)


def check(model, decoder, batch=ROWS):
    tokens = tokens_like(model.config, batch, 12, seed=1)
    lengths = (jnp.arange(batch) * 2 + 3) % LENGTH + 1
    full, _ = forward(model, tokens)
    found = logits_of(model, decoder, tokens, lengths)
    for row, length in enumerate(np.asarray(lengths)):
        expected = full[row, length : length + STEPS]
        np.testing.assert_allclose(found[row], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("looped", [True, False])
def test_a_prepared_step_is_the_full_forward(name, looped):
    model = build(CONFIGS[name])
    check(model, prepare(model, ROWS, looped))


@pytest.mark.parametrize("name", ["union", "few of many", "moe"])
def test_one_row_reads_its_picks_alone(name):
    model = build(CONFIGS[name])
    check(model, prepare(model, 1, False), batch=1)


@pytest.mark.parametrize("name", ["union", "moe"])
def test_many_rows_are_packed(name, monkeypatch):
    monkeypatch.setattr(routing, "MOST_ROWS", 1)
    monkeypatch.setattr(routing, "by_pick", lambda *sizes: False)
    model = build(CONFIGS[name])
    decoder = prepare(model, 5, True)  # laid out anew: nothing of it is cached
    assert isinstance(decoder.layers[0].mlp, OwnPart)
    check(model, decoder, batch=5)


def test_weights_have_the_compute_dtype_and_routers_stay_float32(monkeypatch):
    # A CPU holds the same numbers in float32: test_decode_weights.py.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = dataclasses.replace(CONFIGS["union"], compute_dtype="bfloat16")
    model = build(config)
    block = prepare(model, 1, False).layers[1]
    for part in (block.attention, block.mlp):
        assert part.inputs.weight.dtype == part.outputs.weight.dtype == jnp.bfloat16
        assert part.router.weights.weight.dtype == jnp.float32
    stack = model.trunk.blocks[0]
    wanted = np.swapaxes(np.asarray(stack.mlp.w_up[...][1]), 1, 2)
    np.testing.assert_array_equal(
        block.mlp.inputs.weight[:, 0], wanted.astype(jnp.bfloat16)
    )


def test_which_batches_products_without_packing_serve():
    assert routing.serves(1, 64, 2) and routing.serves(32, 64, 2)
    assert not routing.serves(33, 64, 2)  # most of the experts would be for nothing
    assert routing.serves(64, 16, 8) and not routing.serves(65, 16, 8)
    assert routing.by_pick(2, 16, 8) and not routing.by_pick(3, 16, 8)
