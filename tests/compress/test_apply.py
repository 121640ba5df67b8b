"""A run cut smaller is the dense model with the same channels at zero."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.compress.test_statistics import batch_of
from tests.decompose.test_exact import DENSE, draw
from uoe_jax.compress.methods import SORTERS, sort_model
from uoe_jax.compress.observed import take_apart
from uoe_jax.compress.options import Compress
from uoe_jax.compress.query_key import kept_pairs, pair_dims
from uoe_jax.compress.statistics import observe
from uoe_jax.compress.widths import (
    choose_widths,
    layer_parts,
    with_widths,
)
from uoe_jax.config import UnionConfig
from uoe_jax.decompose.split import split_params, union_config
from uoe_jax.errors import ConfigError
from uoe_jax.interop.padding import pad_layers
from uoe_jax.model import with_params
from uoe_jax.model.stacks import from_layers, to_layers
from uoe_jax.widths import width_problems

WIDE = dataclasses.replace(DENSE, head_dim=8, num_heads=4, num_kv_heads=2)


def seen_and_sorted(config, params, method="modegpt"):
    batch = batch_of(config)
    seen = observe(with_params(config, params), batch)
    made = sort_model(take_apart(config, params, {}, seen), method)
    return batch, (made.rest, made.layers), made.found, made.curves


def cut(config, params, widths, method="modegpt", options=None):
    batch, given, found, curves = seen_and_sorted(config, params, method)
    parts = layer_parts(config, curves, options or Compress(cut=0.3, multiple=2))
    chosen = [widths[part.name] for part in parts]
    buffers = [{} for _ in found]
    return batch, found, with_widths(config, given, found, parts, chosen, buffers)


def logits(config, params, batch, buffers=None):
    model = with_params(config, params, buffers)
    arrays = {k: jnp.asarray(v) for k, v in batch.items()}
    return np.asarray(model(arrays["tokens"], segments=arrays["segments"])[0])


def near(found, wanted, tolerance=1e-5):
    assert np.abs(found - wanted).max() <= tolerance * max(1, np.abs(wanted).max())


@pytest.mark.parametrize("method", SORTERS)
def test_nothing_cut_is_the_same_model_bit_for_bit(method):
    params = draw(WIDE, 1)
    whole = {"mlp": 24, "query_key": 4, "value_output": 8}
    _, _, made = cut(WIDE, params, whole, method)
    assert made.config == WIDE and not made.buffers
    assert all((made.params[name] == params[name]).all() for name in params)


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_cut_pairs_are_pairs_at_zero_in_the_dense_model(position):
    config = dataclasses.replace(WIDE, position=position)
    params = draw(config, 2)
    count = 3 if position == "rope" else 6
    widths = {"mlp": 24, "query_key": count, "value_output": 8}
    batch, found, made = cut(config, params, widths)
    rest, layers = to_layers(params, config)
    for layer, channels in zip(layers, found, strict=True):
        dims = pair_dims(kept_pairs(channels.pairs, count), 8, config.rotates)
        mask = np.zeros((2, 8), np.float32)
        np.put_along_axis(mask, dims, 1, axis=1)
        layer["attention.wk"] = layer["attention.wk"] * mask[None, None]
        layer["attention.bk"] = layer["attention.bk"] * mask[None]
    wanted = logits(config, from_layers(rest, layers, config), batch)
    near(logits(made.config, made.params, batch, made.buffers), wanted)
    assert made.config.of_layer(0).key_dim == 6


def test_cut_neurons_and_values_are_ones_at_zero_in_the_dense_model():
    params = draw(WIDE, 3)
    widths = {"mlp": 10, "query_key": 4, "value_output": 4}
    batch, _, made = cut(WIDE, params, widths, "drop")
    rest, layers = to_layers(params, WIDE)
    _, _, found, _ = seen_and_sorted(WIDE, params, "drop")
    for layer, channels in zip(layers, found, strict=True):
        off = channels.neurons[0].order[10:]
        layer["mlp.w_down"][:, off] = 0
        for head, basis in enumerate(channels.values):
            dropped = np.flatnonzero(basis.into[:, 4:].any(axis=1))
            layer["attention.wo"][:, head, :, dropped] = 0
    wanted = logits(WIDE, from_layers(rest, layers, WIDE), batch)
    near(logits(made.config, made.params, batch, made.buffers), wanted)


def test_fits_bring_the_model_nearer_than_dropping():
    params = draw(WIDE, 4)
    widths = {"mlp": 12, "query_key": 4, "value_output": 4}
    errors = {}
    for method in ("modegpt", "sort"):
        batch, _, made = cut(WIDE, params, widths, method)
        found = logits(made.config, made.params, batch, made.buffers)
        errors[method] = np.square(found - logits(WIDE, params, batch)).sum()
    assert errors["modegpt"] < errors["sort"]


@pytest.mark.parametrize("method", ["drop", "modegpt"])
def test_a_union_all_on_with_experts_cut_is_the_dense_model_cut_so(method):
    params = draw(WIDE, 5)
    union = union_config(WIDE, 4, 4, ("mlp",))
    routed = split_params(params, WIDE, union)
    widths = {"mlp": 4, "query_key": 3, "value_output": 6}
    batch, found, made = cut(union, routed, widths, method)
    rest, layers = to_layers(made.params, made.config)
    assert layers[0]["mlp.w_up"].shape == (4, 16, 4)
    whole_rest, dense = to_layers(params, WIDE)
    for layer, other, channels in zip(dense, layers, found, strict=True):
        whole = layer["mlp.w_down"] = np.zeros_like(layer["mlp.w_down"])
        for expert, neurons in enumerate(channels.neurons):
            kept = 6 * expert + neurons.order[:4]
            whole[0, kept] = other["mlp.w_down"][expert]
    # The same attention, and the dense model's neurons at zero.
    for layer, other in zip(dense, layers, strict=True):
        layer |= {n: a for n, a in other.items() if n.startswith("attention.")}
    config = dataclasses.replace(
        WIDE, widths=dataclasses.replace(made.config.widths, d_ff=None)
    )
    wanted = logits(config, from_layers(whole_rest, dense, config), batch, made.buffers)
    near(logits(made.config, made.params, batch, made.buffers), wanted, 2e-5)


def test_a_cut_model_sees_how_far_tokens_are_apart_not_where_they_are():
    config = dataclasses.replace(WIDE, max_seq_len=64)
    params = draw(config, 9)
    widths = {"mlp": 12, "query_key": 2, "value_output": 4}
    batch, _, made = cut(config, params, widths)
    model = with_params(made.config, made.params, made.buffers)
    tokens, segments = (jnp.asarray(batch[k]) for k in ("tokens", "segments"))
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    here, there = (
        np.asarray(model(tokens, segments=segments, positions=places + shift)[0])
        for shift in (0, 41)
    )
    near(here, there, 1e-4)
    turned = np.asarray(model(tokens, segments=segments, positions=2 * places)[0])
    assert np.abs(turned - here).max() > 1e-2


@pytest.mark.parametrize("allocate", ["uniform", "bi", "curve", "seconds"])
def test_every_allocation_keeps_its_share(allocate):
    params = draw(WIDE, 6)
    options = Compress(cut=0.4, allocate=allocate, multiple=1)
    _, _, found, curves = seen_and_sorted(WIDE, params)
    parts = layer_parts(WIDE, curves, options)
    widths = choose_widths(parts, np.array([0.1, 0.3]), 0.4, options)
    places = [list(p.widths).index(w) for p, w in zip(parts, widths, strict=True)]
    spent = sum(p.costs[i] for p, i in zip(parts, places, strict=True))
    share = spent / sum(p.costs[-1] for p in parts)
    assert share <= 0.6 + (0.06 if allocate in ("uniform", "bi") else 1e-9)
    assert share > (0.5 if allocate != "seconds" else 0)


def test_normalised_queries_and_keys_stay_whole():
    config = dataclasses.replace(WIDE, qk_norm=True)
    params = draw(config, 7)
    _, _, _, curves = seen_and_sorted(config, params)
    parts = layer_parts(config, curves, Compress(cut=0.3))
    assert {part.name for part in parts} == {"mlp", "value_output"}


def test_an_unknown_device_is_refused():
    params = draw(WIDE, 8)
    _, _, _, curves = seen_and_sorted(WIDE, params)
    options = Compress(cut=0.3, allocate="seconds", device="abacus")
    with pytest.raises(ConfigError, match="device is 'abacus', of which no model"):
        layer_parts(WIDE, curves, options)


def test_a_cut_must_be_a_share():
    with pytest.raises(ConfigError, match="no cut given"):
        Compress().check()
    with pytest.raises(ConfigError, match="method is 'prune'; expected one of"):
        Compress(cut=0.3, method="prune")


def test_dense_attention_between_routed_ones_is_cut():
    """Routed attention stays whole: the model is that of whole layers with zeros."""
    config = dataclasses.replace(
        WIDE,
        num_layers=4,
        attention=("dense", "union"),
        union=UnionConfig(num_experts=2, top_k=1),
    )
    params, batch = draw(config, 1), batch_of(config, rows=30)
    seen = observe(with_params(config, params), batch)
    model = sort_model(take_apart(config, params, {}, seen), "modegpt")
    made = model.cut(Compress(cut=0.4, multiple=2, allocate="uniform"))
    assert made.config.widths.key_dim == made.config.widths.value_dim == (4, 8, 4, 8)
    assert not list(width_problems(made.config))
    whole, padded = pad_layers(*made)
    near(logits(*made[:2], batch, made.buffers), logits(whole, padded, batch))
