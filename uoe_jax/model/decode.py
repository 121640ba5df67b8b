"""Prefill and one-token decoding through a key/value cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from uoe_jax.model.attention import (
    DenseAttention,
    UnionAttention,
    head_picks,
    pick_heads,
)
from uoe_jax.model.block import Block
from uoe_jax.model.cache import Entry, append_rows, write_prompt, write_state
from uoe_jax.model.context import Context
from uoe_jax.model.depth import DepthBlock
from uoe_jax.model.linear import rows_to_picks
from uoe_jax.model.mlp import DenseMlp
from uoe_jax.model.moba import MobaAttention, visible_rows
from uoe_jax.model.router import Routing, gate_values
from uoe_jax.model.shared_kv import SharedKvAttention
from uoe_jax.model.trunk import Trunk


def prefill_layers(
    trunk: Trunk,
    x: Float[Array, "B T D"],
    context: Context,
    layers: tuple[Entry, ...],
) -> tuple[Float[Array, "B T D"], tuple[Entry, ...]]:
    """Return the last hidden state of whole prompts and the filled cache entries.

    Padding after a prompt is causally invisible to it, and decoding overwrites it.
    """

    def body(carry: Any, block: Block, stack: int, index: Any) -> tuple[Any, None]:
        x, layers = carry
        x, stats, key_value = block(x, context)
        entry = write_prompt(layers[stack], index, key_value, stats)
        return (x, _replace(layers, stack, entry)), None

    (x, layers), _ = trunk.scan(body, (x, layers))
    return trunk.norm(x), layers


def decode_layers(
    trunk: Trunk,
    x: Float[Array, "B D"],
    layers: tuple[Entry, ...],
    lengths: Int[Array, " B"],
) -> tuple[Float[Array, "B D"], tuple[Entry, ...]]:
    """Return the hidden state of one new token a row and the updated cache entries."""

    # The cache is carried, not scanned over: its update then happens in place.
    def body(carry: Any, block: Block, stack: int, index: Any) -> tuple[Any, None]:
        x, layers = carry
        x, entry = decode_block(block, x, layers[stack], index, lengths)
        return (x, _replace(layers, stack, entry)), None

    (x, layers), _ = trunk.scan(body, (x, layers))
    return trunk.norm(x), layers


def decode_block(
    block: Block,
    x: Float[Array, "B D"],
    entry: Entry,
    index: int | Array,
    lengths: Int[Array, " B"],
) -> tuple[Float[Array, "B D"], Entry]:
    """Return the block's output for token number `lengths` of each row."""
    if not isinstance(block, DepthBlock):
        return _decode_inside(block, x, entry, index, lengths, lengths)
    scores, asked = block.router(block.attention_norm(x))
    count = entry["depth"]["count"][index]
    y, entry = _decode_inside(block, x, entry, index, lengths, count)
    # What a token that stays outside wrote is overwritten by the next one.
    state = {"count": count + asked.astype(count.dtype)}
    entry = {**entry, "depth": write_state(entry["depth"], index, state)}
    gate = gate_values(scores, "sigmoid")[:, None].astype(x.dtype)
    return jnp.where(asked[:, None], x + (y - x) * gate, x), entry


def _decode_inside(
    block: Block,
    x: Float[Array, "B D"],
    entry: Entry,
    index: int | Array,
    lengths: Int[Array, " B"],
    row: Int[Array, " B"],
) -> tuple[Float[Array, "B D"], Entry]:
    """Run a block on one token a sample, whose keys go to `row` of the cache."""
    normed = block.attention_norm(x)
    attention = block.attention
    if isinstance(attention, SharedKvAttention):
        y, entry = _decode_shared(attention, normed, entry, index, lengths)
    elif isinstance(attention, UnionAttention):
        y, entry = _decode_union(attention, normed, entry, index, lengths)
    else:
        y, entry = _decode_dense(attention, normed, entry, index, lengths, row)
    x = x + y
    normed = block.mlp_norm(x)
    if isinstance(block.mlp, DenseMlp):
        return x + block.mlp.apply(normed), entry
    routing, entry = _route(block.mlp.router, normed, entry, "mlp", index, lengths)
    return x + block.mlp.apply(normed[:, None], routing)[:, 0], entry


def _route(
    router: Any,  # of a causal model
    x: Float[Array, "B D"],
    entry: Entry,
    part: str,
    index: int | Array,
    lengths: Int[Array, " B"],
) -> tuple[Routing, Entry]:
    """Route one token a row, with what the router remembers of earlier ones."""
    stored = entry.get(part, {})
    state = {name: value[index] for name, value in stored.items()}
    routing, state = router.decode(x, state, lengths)
    if not stored:
        return routing, entry
    return routing, {**entry, part: write_state(stored, index, state)}


def _decode_dense(
    attention: DenseAttention,
    x: Float[Array, "B D"],
    entry: Entry,
    index: int | Array,
    lengths: Int[Array, " B"],
    row: Int[Array, " B"],
) -> tuple[Float[Array, "B D"], Entry]:
    q, k, v = attention.project_qkv(x, lengths)
    entry, keys, values = _append(entry, index, row, k, v)
    q = q.reshape(*k.shape[:2], -1, k.shape[2])
    visible = written_rows(keys, row)
    if isinstance(attention, MobaAttention):
        moba = attention.config.moba
        visible = visible_rows(q, keys, row, moba.block_size, moba.top_k)
    out = attend_cache(q, keys, values, visible)
    return attention.project_out(out.reshape(x.shape[0], -1, k.shape[2])), entry


def _append(
    entry: Entry, index: int | Array, row: Int[Array, " B"], k: Array, v: Array
) -> tuple[Entry, Array, Array]:
    """Return the entry with one token's keys and values, and the layer's caches."""
    new = {
        name: append_rows(entry[name], index, row, value[:, None])
        for name, value in (("k", k), ("v", v))
    }
    return {**entry, **new}, new["k"][index], new["v"][index]


def _decode_shared(
    attention: SharedKvAttention,
    x: Float[Array, "B D"],
    entry: Entry,
    index: int | Array,
    lengths: Int[Array, " B"],
) -> tuple[Float[Array, "B D"], Entry]:
    routing, entry = _route(attention.router, x, entry, "attention", index, lengths)
    choices = routing.choices[:, 0]
    packing = attention.router.pack(routing)
    rows = attention.project_queries(x[:, None], packing, lengths[:, None])
    q = rows_to_picks(rows, packing)
    batch, picks, j, groups, width = q.shape
    k, v = attention.project_keys(x, lengths)
    entry, *cached = _append(entry, index, lengths, k, v)

    def chosen(a: Array) -> Array:
        a = a.reshape(*a.shape[:2], -1, j, width)
        a = jnp.take_along_axis(a, choices[:, None, :, None, None], axis=2)
        return a.reshape(*a.shape[:2], -1, width)

    keys, values = map(chosen, cached)
    q = q.reshape(batch, picks * j, groups, width)
    out = attend_cache(q, keys, values, written_rows(keys, lengths))
    out = out.reshape(batch, picks, j, groups, width)
    return attention.project_out(pick_heads(out, packing), routing, packing), entry


def _decode_union(
    attention: UnionAttention,
    x: Float[Array, "B D"],
    entry: Entry,
    index: int | Array,
    lengths: Int[Array, " B"],
) -> tuple[Float[Array, "B D"], Entry]:
    routing, entry = _route(attention.router, x, entry, "attention", index, lengths)
    choices = routing.choices[:, 0]
    packing = attention.router.pack(routing)
    heads = attention.project_rows(x[:, None], packing, lengths[:, None])
    q, k, v = (head_picks(part, packing) for part in heads)
    first = lengths * choices.shape[1]
    entry = {
        **entry,
        "k": append_rows(entry["k"], index, first, k),
        "v": append_rows(entry["v"], index, first, v),
        "experts": append_rows(entry["experts"], index, first, choices),
    }
    keys, values, experts = (entry[name][index] for name in ("k", "v", "experts"))
    out = attend_log(q, choices, keys, values, experts, lengths)
    y = attention.project_out(pick_heads(out, packing), routing, packing)
    return y, entry


def attend_cache(
    q: Float[Array, "B K G H"],
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K H"],
    visible: Bool[Array, "B K2 G2 S"],
) -> Float[Array, "B K G H"]:
    """Return the attention of one query a head over the visible rows, at least one."""
    scores = jnp.einsum("bkgh,bskh->bkgs", q, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scores * q.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bkgs,bskh->bkgh", weights, values)


def written_rows(
    keys: Float[Array, "B S K H"], last: Int[Array, " B"]
) -> Bool[Array, "B 1 1 S"]:
    """Return which rows of a cache hold something: 0 to `last`."""
    return (jnp.arange(keys.shape[1])[None] <= last[:, None])[:, None, None]


def attend_log(
    q: Float[Array, "B X J G H"],
    choices: Int[Array, "B X"],
    keys: Float[Array, "B R J H"],
    values: Float[Array, "B R J H"],
    experts: Int[Array, "B R"],
    position: Int[Array, " B"],
) -> Float[Array, "B X J G H"]:
    """Return the attention of each pick over the log rows of its expert.

    Each row is multiplied by the one query of its expert, so scores cost X/E of dense.
    """
    top_k = choices.shape[1]
    match = experts[:, :, None] == choices[:, None]
    token = jnp.arange(keys.shape[1]) // top_k
    match = match & (token[None] <= position[:, None])[..., None]
    pick = jnp.argmax(match, axis=-1)
    q_rows = jnp.take_along_axis(q, pick[:, :, None, None, None], axis=1)
    scores = jnp.sum(q_rows * keys[:, :, :, None], axis=-1, dtype=jnp.float32)
    scores = scores[:, :, None] * q.shape[-1] ** -0.5
    scores = jnp.where(match[..., None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=1).astype(values.dtype)
    return jnp.einsum("brxjg,brjh->bxjgh", weights, values)


def _replace(layers: tuple[Entry, ...], stack: int, entry: Entry) -> tuple[Entry, ...]:
    return (*layers[:stack], entry, *layers[stack + 1 :])
