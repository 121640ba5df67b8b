"""Heads of a layer beside those of its kind: local and full ones that all tokens use.

And what all heads of a layer read: its normed tokens, or a convolution of these.

Their weights are those of dense attention. A local head sees the last `window` tokens,
and a cache holds no more of it: token t lies in row t % window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax.config import ModelConfig
from uoe_jax.model.attention import AttentionWeights, DenseAttention
from uoe_jax.model.cache import Entry, Kept, Slot, write_state, written_rows
from uoe_jax.model.context import Context
from uoe_jax.model.convolution import Convolution, last_tokens
from uoe_jax.model.layers import Norm
from uoe_jax.model.routing.balance import Stats
from uoe_jax.varying import vary_over
from uoe_jax.weights import GROUPS


class HeadGroup(DenseAttention):
    """One group of heads; `config` is its own, of `heads` in the whole layer."""

    def __init__(self, config: ModelConfig, heads: int, *, rngs: Any):
        super().__init__(config, rngs=rngs)
        # Together the groups write as much as dense attention of all their heads.
        self.wo[...] = self.wo[...] * (config.num_heads / heads) ** 0.5

    @staticmethod
    def cache_shapes(config: ModelConfig, max_len: int) -> dict[str, Any]:
        """Return what a row of the cache holds: keys and values of the window."""
        rows = min(config.window[0] or max_len, max_len)
        return AttentionWeights.cache_shapes(config, rows)

    def decode(
        self, x: Float[Array, "B D"], slot: Slot
    ) -> tuple[Float[Array, "B D"], Slot]:
        """Return the output for token `slot.lengths` of each row, and its slot."""
        rows = slot.entry["k"].shape[2]
        slot = slot._replace(row=slot.lengths % rows)
        # Once the rows are full, all of them are of the window.
        last = jnp.minimum(slot.lengths, rows - 1)
        return self.decode_visible(x, slot, lambda q, keys: written_rows(keys, last))


def window_tokens(
    rows: int, lengths: Int[Array, " B"], length: int
) -> Int[Array, "B R"]:
    """Return the token of a prompt that each of a cache's rows keeps.

    The last one below the prompt's length whose number is the row's, modulo `rows`; any
    where there is none yet.
    """
    last = lengths[:, None] - 1
    token = last - (last - jnp.arange(rows)[None]) % rows
    return jnp.clip(token, 0, length - 1)


def write_group(
    stored: Array, index: int | Array, values: Array, lengths: Int[Array, " B"]
) -> Array:
    """Return a group's keys or values [n, B, R, ...] with a prompt's of layer `index`.

    `values` are those of all its tokens, [B, T, ...], of `lengths` that count.
    """
    values = values.astype(stored.dtype)
    rows, length = stored.shape[2], values.shape[1]
    if length <= rows:
        return stored.at[index, :, :length].set(values)
    token = window_tokens(rows, lengths, length)
    return stored.at[index].set(
        jnp.take_along_axis(values, token[:, :, None, None], axis=1)
    )


def write_beside(
    entry: Entry, index: int | Array, kept: Kept, context: Context
) -> Entry:
    """Return the entry with what prompts leave beside the kind of layer `index`.

    In its groups of heads, and the tokens that its convolution reads next.
    """
    new = dict(entry)
    if "convolution" in kept:
        state = {"tokens": kept["convolution"]}
        new["convolution"] = write_state(entry["convolution"], index, state)
    for name in GROUPS:
        if name in kept:
            assert context.lengths is not None
            rows = dict(zip("kv", kept[name], strict=True))
            new[name] = {
                part: write_group(entry[name][part], index, values, context.lengths)
                for part, values in rows.items()
            }
    return new


class LayerHeads(NamedTuple):
    """All heads of a layer: those of its kind, and the groups beside them by name."""

    attention: Any
    groups: Mapping[str, HeadGroup]
    convolution: Convolution | None  # of what all of them read

    @property
    def router(self) -> Any:
        """The router of the layer's kind, which reads what no device has changed."""
        return getattr(self.attention, "router", None)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "B T D"], Stats, Kept]:
        """Return the sum of all heads' outputs, statistics, keys and values by name."""
        kept: Kept = {}
        if self.convolution is not None:
            if context.lengths is not None:
                before = self.convolution.before
                kept["convolution"] = last_tokens(x, context.lengths, before)
            x = self.convolution(x, context)
        y, stats, kept["attention"] = self.attention(x, context)
        if context.parallel is not None and context.parallel.has("tensor"):
            # Cast once for all products of x: their gradients take one sum together.
            x = vary_over(x, ("tensor",))
        for name, group in self.groups.items():
            more, _, kept[name] = group(x, context)
            y = y + more
        return y, stats, kept


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenHeads:
    """All heads of a layer for one token a row."""

    attention: Any  # in its form for decoding
    groups: dict[str, HeadGroup]
    convolution: Convolution | None

    def add_to(
        self, x: Float[Array, "B D"], norm: Norm | None, slot: Slot
    ) -> tuple[Float[Array, "B D"], Slot]:
        """Return x plus all heads' outputs of norm(x), and its slot."""
        inner = x if norm is None else norm(x)
        if self.convolution is not None:
            inner, slot = self.convolution.decode(inner, slot)
        for name, group in self.groups.items():
            own = slot._replace(entry=slot.entry[name])
            y, own = group.decode(inner, own)
            slot = slot._replace(entry={**slot.entry, name: own.entry})
            x = x + y
        return self.attention.add_to(inner, None, slot, x)
