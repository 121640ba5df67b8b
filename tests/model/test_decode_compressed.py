"""Compressed decoders: every cut is decoded by the kernels of whole models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model.test_decoding import ROWS, check, logits_of
from tests.model.test_widths import narrow_model
from tests.model.tiny_models import build, tiny, tokens_like
from tests.ops.cases import on_triton
from uoe_jax.config import LayerWidths
from uoe_jax.hardware.count import cache_bytes
from uoe_jax.model import init_cache
from uoe_jax.model.decoding import step
from uoe_jax.model.decoding.attention import TokenAttention
from uoe_jax.model.decoding.mlp import TokenMlp
from uoe_jax.model.decoding.step import OwnPart, prepare
from uoe_jax.ops import nvidia

HEADS = dict(head_dim=48, num_heads=4, num_kv_heads=2, activation="swiglu")
# Keys of 20 have zeros up to 32 of the model's 48, those of 38 up to all of these.
NARROW = {
    "all parts": ({}, dict(key_dim=(20, 20), value_dim=(20, 20), d_ff=(40, 40))),
    "unequal": ({}, dict(key_dim=(20, 38), value_dim=(45, 9), d_ff=(40, 64))),
    "keys": ({"use_bias": True}, dict(key_dim=(38, 38))),
    "values": ({"qk_norm": True, "use_bias": True}, dict(value_dim=(20, 20))),
    "mlp": ({"use_bias": True, "activation": "gelu"}, dict(d_ff=(40, 24))),
    "window": ({"window": (4,), "use_bias": True}, dict(key_dim=(20, 20))),
    "learned": ({"position": "learned"}, dict(key_dim=(18, 6), value_dim=(48, 13))),
}
RANKS = {
    "all": dict(up_rank=(9, 9), gate_rank=(9, 9), down_rank=(9, 9)),
    "unequal": dict(up_rank=(3, 12), gate_rank=(9, 5), down_rank=(11, 2)),
    "some": dict(up_rank=(9, 0), down_rank=(0, 5)),
    "narrow": dict(up_rank=(9, 9), gate_rank=(3, 3), d_ff=(40, 40), key_dim=(20, 20)),
}


def narrow(name):
    changes, widths = NARROW[name]
    return narrow_model(tiny(**{**HEADS, **changes}), LayerWidths(**widths), 5)[0]


def low(name, **changes):
    return build(tiny(**HEADS, widths=LayerWidths(**RANKS[name]), **changes))


def forms(decoder):
    return {type(part) for one in decoder.layers for part in (one.attention, one.mlp)}


@pytest.mark.parametrize("name", NARROW)
def test_narrow_layers_decode_as_the_full_forward(name):
    model = narrow(name)
    decoder = prepare(model, ROWS, False)
    assert forms(decoder) == {TokenAttention, TokenMlp}
    check(model, decoder)
    if model.trunk.alike:
        check(model, prepare(model, ROWS, True))


@pytest.mark.parametrize("additions", [{"output_gate": True}, {"sink": True}])
def test_narrow_heads_with_parts_of_their_own_find_what_the_prompt_left(additions):
    changes, widths = NARROW["unequal"]
    config = tiny(**HEADS, **changes, **additions)
    model = narrow_model(config, LayerWidths(**widths), 5)[0]
    decoder = prepare(model, ROWS, False)
    assert isinstance(decoder.layers[0].attention, OwnPart)
    check(model, decoder)


@pytest.mark.parametrize("name", RANKS)
@pytest.mark.parametrize("start", [0, 1 << 40])
def test_low_ranks_decode_as_the_full_forward(name, start, monkeypatch):
    monkeypatch.setitem(step.START_BYTES, "cpu", start)
    model = low(name, use_bias=True)
    decoder = prepare(model, ROWS, False)
    assert forms(decoder) == {TokenAttention, TokenMlp}
    two = {part for block in decoder.layers for part in _two(block.mlp)}
    assert bool(two) == (start == 0)
    check(model, decoder)


def _two(mlp):
    return [name for name in ("before", "after") if getattr(mlp, name) is not None]


def test_low_ranks_of_eight_bits_are_near_the_full_forward():
    model = low("all")
    exact, rounded = prepare(model, ROWS, False), None
    rounded = prepare(step.with_decode_weights(model, "int8"), ROWS, False)
    assert rounded.layers[0].mlp.before.weight.dtype == jnp.int8
    tokens = tokens_like(model.config, ROWS, 12, seed=1)
    lengths = jnp.array([5, 3, 7])
    want, got = (logits_of(model, one, tokens, lengths) for one in (exact, rounded))
    assert 0 < float(jnp.abs(want - got).max()) < 0.05 * float(jnp.abs(want).max())


def test_a_cache_of_narrow_heads_is_of_whole_sixteen_bytes_and_never_wider():
    model = narrow("unequal")
    cache = init_cache(model.config, 2, 8)
    shapes = [(one["k"].shape[-1], one["v"].shape[-1]) for one in cache.layers]
    assert shapes == [(32, 48), (48, 16)]
    held = [a for one in cache.layers for a in one.values()]
    assert sum(a.size * 4 for a in held) == cache_bytes(model.config, 2, 8)


def launched(model, monkeypatch):
    """Return how many kernels a step of one row starts, layer by layer and the head."""
    count = []
    launch = nvidia.launch

    def counting(kernel, *args, **options):
        count.append(kernel)
        return launch(kernel, *args, **options)

    monkeypatch.setattr(nvidia, "launch", counting)
    decoder = prepare(model, 1, False)
    with on_triton():
        cache = init_cache(model.config, 1, 16)
        jax.eval_shape(decoder.decode, jnp.zeros(1, jnp.int32), cache)
    monkeypatch.undo()
    return len(count)


@pytest.mark.parametrize("name", NARROW)
def test_narrow_layers_start_as_many_kernels_as_whole_ones(name, monkeypatch):
    model = narrow(name)
    whole = build(dataclasses.replace(model.config, widths=LayerWidths()))
    assert launched(model, monkeypatch) == launched(whole, monkeypatch) == 11


def test_low_ranks_start_two_kernels_more_or_none(monkeypatch):
    assert launched(low("all"), monkeypatch) == 15
    monkeypatch.setitem(step.START_BYTES, "cpu", 1 << 40)
    assert launched(low("all"), monkeypatch) == 11


@pytest.mark.parametrize("name", ["all parts", "unequal", "values"])
def test_kernels_decode_narrow_layers_as_plain_jax(name):
    model = narrow(name)
    tokens, lengths = tokens_like(model.config, 1, 12, seed=2), jnp.array([5])
    want = logits_of(model, prepare(model, 1, False), tokens, lengths)
    with on_triton():
        got = logits_of(model, prepare(model, 1, False), tokens, lengths)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
