"""Mixture of depths: a block that only the tokens which ask for it pass through."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from uoe_jax.config import ModelConfig
from uoe_jax.model.cache import Kept, Slot
from uoe_jax.model.context import Context
from uoe_jax.model.layers import truncated_normal
from uoe_jax.model.routing.balance import Stats, exceeded_by, token_means
from uoe_jax.model.routing.token import (
    RouterBias,
    gate_values,
    room_of,
    rooms,
    router_scores,
)
from uoe_jax.ops.packing import Packing, combine_rows, gather_rows


class DepthRouter(nnx.Module):
    """A token enters where its own score, balance bias included, is positive.

    Raposo et al. 2024 let the highest scores of the sequence in, which looks ahead;
    here no decision does. The bias follows the score that `keep` of a training batch's
    tokens exceed, so gates that shrink all together can't close the block for good.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.keep, self.capacity_factor = config.mod.keep, config.mod.capacity_factor
        shape = (config.d_model, 1)
        std = config.mod.router_init_std
        self.weight = nnx.Param(truncated_normal(rngs, shape, std))
        self.bias = RouterBias(jnp.zeros(1))

    def __call__(
        self, x: Float[Array, "*N D"]
    ) -> tuple[Float[Array, "*N"], Bool[Array, "*N"]]:
        """Return float32 scores and which tokens ask to enter."""
        scores = router_scores(x, self.weight[...])[..., 0]
        bias = self.bias[...].reshape((1,) * scores.ndim)
        return scores, jax.lax.stop_gradient(scores) + bias > 0

    @property
    def share(self) -> float:
        """Share of a training sample's tokens that there is room for."""
        return min(self.capacity_factor * self.keep, 1.0)

    def stats(
        self,
        scores: Float[Array, "B T"],
        asked: Bool[Array, "B T"],
        entered: Bool[Array, "B T"],
        context: Context,
    ) -> Stats:
        """Return the statistics every router has; experts are "block" and "around".

        dropped: share of the tokens that asked and found no room. z_loss: mean squared
        score. balance_loss: 1, as the bias does the balancing. threshold: the score
        that `keep` of the tokens exceed.
        """
        # Sums of positive terms: p log p of a saturated sigmoid would be NaN.
        size = jnp.abs(scores)
        sums = {
            "asked": asked.astype(jnp.float32),
            "entered": entered.astype(jnp.float32),
            "z": jnp.square(scores),
            "entropy": jax.nn.softplus(-size) + size * jax.nn.sigmoid(-size),
        }
        means = token_means(sums, context)
        lost = means["asked"] - means["entered"]
        stats = {
            "load": jnp.stack([means["asked"], 1 - means["asked"]]),
            "entropy": means["entropy"],
            "dropped": lost / jnp.maximum(means["asked"], 1e-9),
            "balance_loss": jnp.ones(()),
            "z_loss": means["z"],
            "threshold": exceeded_by(scores, self.keep, context),
        }
        if context.collect_choices:
            stats["choices"] = jnp.where(entered, 0, 1)[..., None]
        return stats


def run_around(
    block: Any,  # with `router`, `attention_norm` and `run`
    x: Float[Array, "B T D"],
    context: Context,
    key: jax.Array | None,
    causal: bool,
) -> tuple[Float[Array, "B T D"], dict[str, Stats], Kept]:
    """Run a block on the tokens that ask to enter; the others go around it.

    Tokens inside see only those inside. What the block adds to a token is multiplied
    by the gate `2 sigmoid(score)`. Returns the output, statistics, and keys and values
    of the entered tokens.
    """
    batch, length, width = x.shape
    scores, asked = block.router(block.attention_norm(x))
    if context.segments is not None:
        asked = asked & (context.segments != 0)
    room: int = length
    limit: int | Array = length
    if context.train:
        room = int(rooms(block.router.share, length)[length])
        limit = room_of(block.router.share, length, context.segments)
    inside = enter(asked, room, limit)
    take = lambda a: a.reshape(-1)[inside.packing.token_ids].reshape(batch, room)
    segments = None
    if context.segments is not None:
        segments = jnp.where(inside.filled, take(context.segments), 0)
    elif not causal:
        segments = inside.filled.astype(jnp.int32)
    scored = context.scored
    if scored is not None:
        scored = inside.filled & take(scored)
    inner = context._replace(
        positions=take(context.positions),
        segments=segments,
        scored=scored,
        lengths=None,
    )
    rows = gather_rows(x.reshape(-1, width), inside.packing)
    rows = rows.reshape(batch, room, width)
    y, stats, kept = block.run(rows, inner, key)
    gates = jnp.where(inside.filled, take(gate_values(scores, "sigmoid")), 0)
    added = (y - rows) * gates[..., None].astype(x.dtype)
    x = x + combine_rows(added.reshape(-1, width), inside.packing).reshape(x.shape)
    own = block.router.stats(scores, asked, inside.entered, context)
    if context.lengths is not None:
        before = jnp.arange(length)[None] < context.lengths[:, None]
        count = jnp.sum(inside.entered & before, axis=1, dtype=jnp.int32)
        own["state"] = {"count": count}
    return x, {"depth": own, **stats}, kept


def decode_around(
    block: Any, x: Float[Array, "B D"], slot: Slot
) -> tuple[Float[Array, "B D"], Slot]:
    """Run a block on one token a row, if it asks to enter."""
    scores, asked = block.router(block.attention_norm(x))
    count = slot.state("depth")["count"]
    # What a token that stays outside wrote is overwritten by the next one.
    y, slot = block.run_token(x, slot._replace(row=count))
    slot = slot.remember("depth", {"count": count + asked.astype(count.dtype)})
    gate = gate_values(scores, "sigmoid")[:, None].astype(x.dtype)
    return jnp.where(asked[:, None], x + (y - x) * gate, x), slot


class Inside(NamedTuple):
    """The tokens of each sample that entered, in order, in R slots."""

    packing: Packing  # slot b * R + r <-> token b * T + t
    entered: Bool[Array, "B T"]
    filled: Bool[Array, "B R"]


def enter(
    asked: Bool[Array, "B T"], room: int, limit: int | Int[Array, " B"] | None = None
) -> Inside:
    """Return each sample's first `limit` tokens that ask, in `room` slots."""
    batch, length = asked.shape
    rank = jnp.cumsum(asked, axis=1, dtype=jnp.int32) - 1
    limit = room if limit is None else limit
    if not isinstance(limit, int):
        limit = jnp.minimum(limit, room)[:, None]
    entered = asked & (rank < limit)
    index = jnp.arange(length, dtype=jnp.int32)[None]
    # Those that stay outside fill up the slots behind; nobody reads these.
    order = jnp.sort(jnp.where(entered, index, index + length), axis=1)[:, :room]
    first = jnp.arange(batch, dtype=jnp.int32)[:, None]
    slots = jnp.where(entered, rank + first * room, batch * room).reshape(-1, 1)
    unused: Int[Array, " 2"] = jnp.zeros(2, jnp.int32)
    packing = Packing(
        (order % length + first * length).reshape(-1), slots, unused, unused
    )
    return Inside(packing, entered, order < length)
