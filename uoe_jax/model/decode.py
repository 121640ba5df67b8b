"""Prefill and one-token decoding through a key/value cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax.model.attention import DenseAttention, UnionAttention
from uoe_jax.model.block import Block
from uoe_jax.model.cache import Entry, append_rows, write_prompt
from uoe_jax.model.context import Context
from uoe_jax.model.linear import picks_to_rows, rows_to_picks
from uoe_jax.model.mlp import DenseMlp
from uoe_jax.model.router import PatchRouter, Routing, gate_values, pick_scores
from uoe_jax.model.trunk import Trunk
from uoe_jax.ops.packing import pack_choices


def prefill_layers(
    trunk: Trunk,
    x: Float[Array, "B T D"],
    context: Context,
    layers: tuple[Entry, ...],
    lengths: Int[Array, " B"],
) -> tuple[Float[Array, "B T D"], tuple[Entry, ...]]:
    """Return the last hidden state of whole prompts and the filled cache entries.

    Padding after a prompt is causally invisible to it, and decoding overwrites it.
    """
    leaders = None
    if context.leaders is not None:
        patch = trunk.config.union.patch_size
        start = lengths - lengths % patch
        # A prompt that ends with its patch needs no leader: clip instead of branching.
        leaders = jnp.minimum(start, x.shape[1] - 1)[:, None]

    def body(carry: Any, block: Block, stack: int, index: Any) -> tuple[Any, None]:
        x, layers = carry
        x, stats, key_value = block(x, context)
        entry = write_prompt(layers[stack], index, key_value, stats, leaders)
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
    normed = block.attention_norm(x)
    if isinstance(block.attention, UnionAttention):
        y, entry = _decode_union(block.attention, normed, entry, index, lengths)
    else:
        y, entry = _decode_dense(block.attention, normed, entry, index, lengths)
    x = x + y
    normed = block.mlp_norm(x)
    if isinstance(block.mlp, DenseMlp):
        return x + block.mlp.apply(normed), entry
    routing, entry = _route(block.mlp.router, normed, entry, "mlp", index, lengths)
    return x + block.mlp.apply(normed[:, None], routing)[:, 0], entry


def _route(
    router: PatchRouter,
    x: Float[Array, "B D"],
    entry: Entry,
    part: str,
    index: int | Array,
    lengths: Int[Array, " B"],
) -> tuple[Routing, Entry]:
    """Route one token a row: a patch's first decides, later ones look its choice up."""
    scores = router.scores(x)
    choices = router.choose(scores)
    if part in entry:
        first = (lengths % router.patch_size == 0)[:, None]
        choices = jnp.where(first, choices, entry[part][index])
        entry = {**entry, part: entry[part].at[index].set(choices)}
    gates = gate_values(pick_scores(scores, choices), router.gate)
    return Routing(choices[:, None], gates[:, None], {}), entry


def _decode_dense(
    attention: DenseAttention,
    x: Float[Array, "B D"],
    entry: Entry,
    index: int | Array,
    lengths: Int[Array, " B"],
) -> tuple[Float[Array, "B D"], Entry]:
    q, k, v = attention.project_qkv(x, lengths)
    entry = {
        **entry,
        "k": append_rows(entry["k"], index, lengths, k[:, None]),
        "v": append_rows(entry["v"], index, lengths, v[:, None]),
    }
    keys, values = entry["k"][index], entry["v"][index]
    q = q.reshape(*k.shape[:2], -1, k.shape[2])
    out = attend_cache(q, keys, values, lengths)
    return attention.project_out(out.reshape(x.shape[0], -1, k.shape[2])), entry


def _decode_union(
    attention: UnionAttention,
    x: Float[Array, "B D"],
    entry: Entry,
    index: int | Array,
    lengths: Int[Array, " B"],
) -> tuple[Float[Array, "B D"], Entry]:
    routing, entry = _route(attention.router, x, entry, "attention", index, lengths)
    choices = routing.choices[:, 0]
    packing = pack_choices(routing.choices, attention.wq.shape[0])
    rows = attention.project_rows(x[:, None], packing, lengths[:, None])
    q, k, v = (rows_to_picks(part, packing) for part in rows)
    first = lengths * choices.shape[1]
    entry = {
        **entry,
        "k": append_rows(entry["k"], index, first, k),
        "v": append_rows(entry["v"], index, first, v),
        "experts": append_rows(entry["experts"], index, first, choices),
    }
    keys, values, experts = (entry[name][index] for name in ("k", "v", "experts"))
    out = attend_log(q, choices, keys, values, experts, lengths)
    y = attention.project_out(picks_to_rows(out, packing), routing, packing)
    return y, entry


def attend_cache(
    q: Float[Array, "B K G H"],
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K H"],
    position: Int[Array, " B"],
) -> Float[Array, "B K G H"]:
    """Return the attention of one query a head over rows 0..position."""
    scores = jnp.einsum("bkgh,bskh->bkgs", q, keys, preferred_element_type=jnp.float32)
    written = jnp.arange(keys.shape[1])[None] <= position[:, None]
    scores = jnp.where(written[:, None, None], scores * q.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bkgs,bskh->bkgh", weights, values)


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
