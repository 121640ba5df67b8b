"""Attention of one new token a row over its cache, which the token is added to.

A row's cache is a log of R rows: of each token X rows, one a pick, of the J key/value
heads of one expert. Dense attention has one expert with all heads, which each token
picks: its log is the usual cache.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Float32, Int

from uoe_jax.errors import ConfigError
from uoe_jax.ops.cache_attention import xla
from uoe_jax.ops.cache_attention.nvidia import triton
from uoe_jax.ops.dispatch import dispatch
from uoe_jax.ops.token_products.api import Parts, Picks, Scale, static

BACKENDS = {"triton": triton.attend, "xla": xla.attend}


class Store(NamedTuple):
    """Keys, values and experts of the rows of all layers of a stack.

    `experts` is None where there is one.
    """

    keys: Float[Array, "n B R J H"]
    values: Float[Array, "n B R J W"]
    experts: Int[Array, "n B R"] | None = None


class Place(NamedTuple):
    """Where the new token is: its layer in the stack, and the tokens stored before it.

    `cosines` and `sines` are of its rotation, of all pairs of the model's heads; None:
    it isn't rotated.
    """

    layer: int | Array
    stored: Int[Array, " B"]
    cosines: Float32[Array, "B pairs"] | None = None
    sines: Float32[Array, "B pairs"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Heads:
    """What an expert's J key/value heads with G queries each are: widths and norms.

    A token sees the last `window` tokens, itself included; None: all. Values may have
    another width than queries and keys have, and scores may be divided by the root of
    another width. `pairs` are the angles that each head's pairs are turned by, as
    numbers of a place's cosines; None: the first ones, in order.
    """

    kv_heads: int = static()
    groups: int = static()
    width: int = static()
    window: int | None = static(None)
    q_scale: Any = None  # [H]
    k_scale: Any = None
    eps: float = static(0.0)
    value_width: int = static(0)  # 0: `width`
    score_width: int = static(0)  # 0: `width`
    pairs: Any = None  # [J, H/2] integers

    @property
    def values(self) -> int:
        """Width of a head's values."""
        return self.value_width or self.width

    @property
    def scores(self) -> int:
        """Width by whose root scores are divided."""
        return self.score_width or self.width

    @property
    def token(self) -> int:
        """Numbers of a slot: queries, keys and values."""
        one = (self.groups + 1) * self.width + self.values
        return self.kv_heads * one

    @property
    def norms(self) -> tuple[Scale, Scale] | None:
        """The norms of queries and keys."""
        if self.q_scale is None or self.k_scale is None:
            return None
        return Scale(self.q_scale, self.eps), Scale(self.k_scale, self.eps)


def attend(
    token: Float[Array, "B S W"],
    store: Store,
    place: Place,
    heads: Heads,
    picks: Picks | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Parts, Store]:
    """Return a token's attention to its log and itself, and the store with it added.

    Args:
      token: of each slot J*G queries, J keys and J values, as they were projected.
      store: the log; of each row `place.stored` tokens.
      place: where the token is.
      heads: what the numbers of a slot are.
      picks: what each row picked; None: the one expert there is.
      implementation: backend name; None: the first that can serve.

    Raises:
      ConfigError: widths that differ, a routed log without picks or picks without one,
        unknown or unfit backend.
    """
    if token.shape[2] != heads.token:
        values = f", of values {heads.values}" if heads.values != heads.width else ""
        raise ConfigError(
            f"a token's heads are {token.shape[2]} wide; {heads.kv_heads} key heads of "
            f"{heads.groups} queries, width {heads.width}{values}, are {heads.token}"
        )
    if (picks is None) != (store.experts is None):
        raise ConfigError("a log of experts and picks go together; give both or none")
    args = (token, store, place, heads, picks)
    return dispatch("cache_attention", BACKENDS, implementation, *args)
