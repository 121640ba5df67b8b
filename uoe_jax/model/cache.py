"""Key/value cache of a decoder.

Each attention says what it keeps (`cache_shapes`), for the n layers of a stack.
Where keys and values aren't routed: k and v of every token, [n, B, S, K, H]; those of
mixture-of-depths blocks only of the tokens that entered, and their number.
Unions keep an append-only log: row t*X + j holds k and v of token t's j-th pick,
[n, B, S*X, J, H], and which expert that was: exactly X/E of the dense bytes.
Layers whose router remembers something keep that as well (`state_shapes`).
Groups of heads beside a layer's kind have entries of their own, by name; that of local
heads has the last tokens of their window only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int

from uoe_jax.model.routing.balance import PARTS, Stats
from uoe_jax.model.routing.token import Routing
from uoe_jax.ops.cache_attention.xla import (
    append_rows,
    attend_cache,
    attend_log,
    written_rows,
)

__all__ = [
    "Cache",
    "Entry",
    "Kept",
    "KeyValue",
    "Slot",
    "attend_cache",
    "attend_log",
    "route_token",
    "write_prompt",
    "write_state",
    "written_rows",
]

Entry = dict[str, Any]
KeyValue = tuple[Array, Array]
# What a prompt leaves in a layer's cache: keys and values of its kind ("attention").
# Of heads beside these, by the name of their group.
Kept = dict[str, Any]


class Cache(NamedTuple):
    """Tokens held for each row, and one entry per stack of layers."""

    lengths: Int[Array, " B"]
    layers: tuple[Entry, ...]


class Slot(NamedTuple):
    """One layer's place in the cache while one token a row is decoded.

    `lengths` is the number of the token in each row, `row` where its keys and values
    go: another one where not every token enters the layer.
    """

    entry: Entry
    index: int | Array  # of the layer in its stack
    lengths: Int[Array, " B"]
    row: Int[Array, " B"]

    def append(
        self, first: Int[Array, " B"], **rows: Array
    ) -> tuple[Slot, list[Array]]:
        """Return the slot with rows [B, R, ...] written from `first` on, by name, and
        the layer's arrays with them."""
        new = {
            name: append_rows(self.entry[name], self.index, first, value)
            for name, value in rows.items()
        }
        slot = self._replace(entry={**self.entry, **new})
        return slot, [array[self.index] for array in new.values()]

    def append_token(self, k: Array, v: Array) -> tuple[Slot, list[Array]]:
        """Return the slot with a token's keys and values, and those of the layer."""
        return self.append(self.row, k=k[:, None], v=v[:, None])

    def state(self, part: str) -> dict[str, Array]:
        """Return what the layer's router of a part remembers, by name."""
        stored = self.entry.get(part, {})
        return {name: value[self.index] for name, value in stored.items()}

    def remember(self, part: str, state: dict[str, Array]) -> Slot:
        """Return the slot with another state of a part's router."""
        if not state:
            return self
        new = write_state(self.entry[part], self.index, state)
        return self._replace(entry={**self.entry, part: new})


def route_token(
    router: Any, x: Float[Array, "B D"], slot: Slot, part: str
) -> tuple[Routing, Slot]:
    """Route one token a row, with what a causal model's router remembers of earlier
    ones."""
    routing, state = router.decode(x, slot.state(part), slot.lengths)
    return routing, slot.remember(part, state)


def write_prompt(
    entry: Entry, index: int | Array, kept: Kept, stats: dict[str, Stats]
) -> Entry:
    """Return the entry with the prompt's rows written to layer `index` of its stack.

    Those of the layer's kind; groups beside it are left as they are.
    """
    k, v = kept["attention"]
    rows = k.shape[1]
    new = dict(entry)
    for name, value in (("k", k), ("v", v)):
        value = value.astype(entry[name].dtype)
        new[name] = entry[name].at[index, :, :rows].set(value)
    if "experts" in entry:
        own = stats["attention"]
        experts = own.get("stored", own["choices"]).reshape(k.shape[0], rows)
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
