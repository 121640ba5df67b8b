"""Key/value cache of a decoder.

Layers whose keys and values aren't routed keep k and v of every token, [n, B, S, K, H]
for the n layers of a stack; those of mixture-of-depths blocks only of the tokens that
entered, and their number.
Union layers keep an append-only log: row t*X + j holds k and v of token t's j-th pick,
[n, B, S*X, J, H], and which expert that was: exactly X/E of the dense bytes.
Layers whose router remembers something keep that as well (see `router_state`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from uoe_jax.config import ModelConfig, UnionConfig
from uoe_jax.errors import ConfigError
from uoe_jax.model.attention import KeyValue
from uoe_jax.model.balance import PARTS
from uoe_jax.model.balance_stats import Stats
from uoe_jax.model.router import router_state
from uoe_jax.weights import layer_period

Entry = dict[str, Any]


class Cache(NamedTuple):
    """Tokens held for each row, and one entry per stack of layers."""

    lengths: Int[Array, " B"]
    layers: tuple[Entry, ...]


def init_cache(
    config: ModelConfig, batch: int, max_len: int, dtype: str | None = None
) -> Cache:
    """Return an empty cache for `max_len` tokens a row; default the compute dtype."""
    if config.kind != "decoder":
        raise ConfigError(
            f"model.kind is {config.kind!r}; only a decoder has a cache, use 'decoder'"
        )
    period = layer_period(config)
    entries = tuple(
        _entry(config, stack, batch, max_len, dtype or config.compute_dtype)
        for stack in range(period)
    )
    return Cache(jnp.zeros(batch, jnp.int32), entries)


def _entry(
    config: ModelConfig, stack: int, batch: int, max_len: int, dtype: str
) -> Entry:
    attention, mlp = config.layer_kinds[stack]
    depth = len(range(stack, config.num_layers, layer_period(config)))
    union = config.union_for("attention")
    rows, heads = max_len, config.num_kv_heads
    logged = attention == "union" and not union.shared_kv
    if logged:
        rows, heads = max_len * union.top_k, heads // union.num_experts
    entry: Entry = {
        name: jnp.zeros((depth, batch, rows, heads, config.head_dim), dtype)
        for name in ("k", "v")
    }
    if logged:
        entry["experts"] = jnp.zeros((depth, batch, rows), jnp.int32)
    if attention in ("union", "moh"):
        entry["attention"] = _remembered(union, depth, batch)
    if mlp == "union":
        entry["mlp"] = _remembered(config.union, depth, batch)
    if config.block_kinds[stack] == "mod":
        entry["depth"] = {"count": jnp.zeros((depth, batch), jnp.int32)}
    return entry


def _remembered(union: UnionConfig, depth: int, batch: int) -> dict[str, Array]:
    return {
        name: jnp.zeros((depth, *shape), dtype)
        for name, (shape, dtype) in router_state(union, batch).items()
    }


def write_prompt(
    entry: Entry, index: int | Array, key_value: KeyValue, stats: dict[str, Stats]
) -> Entry:
    """Return the entry with the prompt's rows written to layer `index` of its stack."""
    k, v = key_value
    rows = k.shape[1]
    new = dict(entry)
    for name, value in (("k", k), ("v", v)):
        value = value.astype(entry[name].dtype)
        new[name] = entry[name].at[index, :, :rows].set(value)
    if "experts" in entry:
        experts = stats["attention"]["choices"].reshape(k.shape[0], rows)
        new["experts"] = entry["experts"].at[index, :, :rows].set(experts)
    for part in PARTS:
        if entry.get(part):
            new[part] = write_state(entry[part], index, stats[part]["state"])
    return new


def write_state(
    stored: dict[str, Array], index: int | Array, state: dict[str, Array]
) -> dict[str, Array]:
    """Return what routers remember with layer `index` replaced."""
    return {
        name: stored[name].at[index].set(value.astype(stored[name].dtype))
        for name, value in state.items()
    }


def append_rows(
    stored: Array, index: int | Array, first: Int[Array, " B"], rows: Array
) -> Array:
    """Return [n, B, S, ...] with a layer's rows [B, R, ...] written from `first` on."""
    batch, count = rows.shape[:2]
    sample = jnp.arange(batch)[:, None]
    place = first[:, None] + jnp.arange(count)[None]
    return stored.at[index, sample, place].set(rows.astype(stored.dtype))
