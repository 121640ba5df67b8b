"""Key/value cache of a decoder.

Dense layers keep k and v of every token, [n, B, S, K, H] for the n layers of a stack.
Union layers keep an append-only log: row t*X + j holds k and v of token t's j-th pick,
[n, B, S*X, J, H], and which expert that was: exactly X/E of the dense bytes.
Layers routed by patch also keep the choice of the patch that is being written.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from uoe_jax.config import ModelConfig
from uoe_jax.errors import ConfigError
from uoe_jax.model.attention import KeyValue
from uoe_jax.model.balance import layer_period
from uoe_jax.model.router import Stats

Entry = dict[str, Array]


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
    union = config.union
    rows, heads = max_len, config.num_kv_heads
    if attention == "union":
        rows, heads = max_len * union.top_k, heads // union.num_experts
    entry = {
        name: jnp.zeros((depth, batch, rows, heads, config.head_dim), dtype)
        for name in ("k", "v")
    }
    if attention == "union":
        entry["experts"] = jnp.zeros((depth, batch, rows), jnp.int32)
    if union.patch_size > 1:
        for part, kind in (("attention", attention), ("mlp", mlp)):
            if kind == "union":
                shape = (depth, batch, union.top_k)
                entry[part] = jnp.zeros(shape, jnp.int32)
    return entry


def write_prompt(
    entry: Entry,
    index: int | Array,
    key_value: KeyValue,
    stats: dict[str, Stats],
    leaders: Int[Array, "B 1"] | None,
) -> Entry:
    """Return the entry with the prompt's rows written to layer `index` of its stack.

    `leaders` are the first tokens of the patches that the prompts end in.
    """
    k, v = key_value
    rows = k.shape[1]
    new = dict(entry)
    for name, value in (("k", k), ("v", v)):
        value = value.astype(entry[name].dtype)
        new[name] = entry[name].at[index, :, :rows].set(value)
    if "experts" in entry:
        experts = stats["attention"]["choices"].reshape(k.shape[0], rows)
        new["experts"] = entry["experts"].at[index, :, :rows].set(experts)
    for part in ("attention", "mlp"):
        if part in entry and leaders is not None:
            choices = stats[part]["choices"]
            held = jnp.take_along_axis(choices, leaders[..., None], axis=1)[:, 0]
            new[part] = entry[part].at[index].set(held)
    return new


def append_rows(
    stored: Array, index: int | Array, first: Int[Array, " B"], rows: Array
) -> Array:
    """Return [n, B, S, ...] with a layer's rows [B, R, ...] written from `first` on."""
    batch, count = rows.shape[:2]
    sample = jnp.arange(batch)[:, None]
    place = first[:, None] + jnp.arange(count)[None]
    return stored.at[index, sample, place].set(rows.astype(stored.dtype))
