"""Token-choice routing: which experts a token uses and how much each one counts."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from uoe_jax.config import Gate, MoeConfig, UnionConfig
from uoe_jax.errors import choose
from uoe_jax.model.context import Context, patch_leaders
from uoe_jax.model.layers import truncated_normal
from uoe_jax.model.routing.balance import (
    Stats,
    means_of_sums,
    router_stats,
    stats_of_means,
)
from uoe_jax.ops.packing import Packing, pack_choices
from uoe_jax.ops.router.api import kernel_pays, pick_experts
from uoe_jax.ops.router.xla import pick_scores, router_scores

State = dict[str, Array]


class RouterBias(nnx.Variable):
    """Loss-free balance bias: changed by `update_router_bias`, never by a gradient."""


class Routing(NamedTuple):
    """Chosen experts, the float32 gate of each, statistics, and which picks count."""

    choices: Int[Array, "B T X"]
    gates: Float[Array, "B T X"]
    stats: Stats
    kept: Bool[Array, "B T X"] | None = None  # None: all


class Router(nnx.Module):
    """What all routers share: float32 scores, always-on experts, packing.

    Experts 0 to `num_shared - 1` are always on with a gate of 1; scores, biases and
    statistics are of the others, E' = E - num_shared, of which X' are picked.
    """

    varies = False  # whether tokens have unlike numbers of experts

    def __init__(
        self,
        d_model: int,
        config: UnionConfig | MoeConfig,
        causal: bool,
        *,
        rngs: nnx.Rngs,
    ):
        routed = config.num_experts - config.num_shared
        self.num_experts, self.num_shared = config.num_experts, config.num_shared
        self.top_k = config.top_k - config.num_shared
        # Of the routed experts, that training has on at least; 0: all of top_k.
        least = getattr(config, "least_top_k", 0)
        self.least = max(least - config.num_shared, 0)
        self.capacity_factor = config.capacity_factor
        self.gate: str = config.gate
        self.causal = causal
        shape = (d_model, routed)
        self.weight = nnx.Param(truncated_normal(rngs, shape, config.router_init_std))
        self.bias = RouterBias(jnp.zeros(routed))

    @property
    def sees_one_token(self) -> bool:
        """Whether a token's routing depends on nothing but that token."""
        return False

    @property
    def picks(self) -> int:
        """Places for the experts of a token, always-on ones among them."""
        return self.top_k + self.num_shared

    @staticmethod
    def state_shapes(config: Any, batch: int) -> dict[str, tuple[Any, str]]:
        """Return shape and dtype of what the router remembers while decoding."""
        del config, batch
        return {}

    def scores(self, x: Float[Array, "*N D"]) -> Float[Array, "*N E"]:
        """Return float32 scores of the routed experts."""
        return router_scores(x, self.weight[...])

    def choose(self, scores: Float[Array, "*N E"]) -> Int[Array, "*N X"]:
        """Return the experts with the highest scores, balance bias included."""
        return self.choose_by(scores, self.bias[...])

    def choose_by(
        self, scores: Float[Array, "*N E"], bias: Float[Array, " E"]
    ) -> Int[Array, "*N X"]:
        """Return the experts with the highest scores and some biases."""
        bias = bias.reshape((1,) * (scores.ndim - 1) + (-1,))
        return jax.lax.top_k(jax.lax.stop_gradient(scores) + bias, self.top_k)[1]

    def gates(
        self, scores: Float[Array, "*N E"], picks: Int[Array, "*N X"]
    ) -> Float[Array, "*N X"]:
        """Return the gates of the picked experts."""
        return gate_values(pick_scores(scores, picks), self.gate)

    def route(
        self,
        scores: Float[Array, "B T E"],
        decision: Float[Array, "B T E"],
        picks: Int[Array, "B T X"],
        gates: Float[Array, "B T X"],
        context: Context,
    ) -> Routing:
        """Return the routing with statistics, always-on experts and capacity."""
        kept = on = None
        asking = picks
        if self.least and context.draw is not None:
            kept = on = drawn_picks(context.draw, self.least, picks)
            gates = gates_of_some(gates, on, self.gate)
            # Those that are off take no room: of no expert.
            asking = jnp.where(on, picks, scores.shape[-1])
        if self.capacity_factor is not None and context.train:
            share = self.capacity_factor * self.top_k / scores.shape[-1]
            room = room_of(share, scores.shape[1], context.segments)
            kept = within_capacity(asking, scores.shape[-1], room, context.segments)
        stats = router_stats(scores, decision, picks, context, kept, on)
        return self.finish(picks, gates, kept, stats, context.collect_choices)

    def finish(
        self,
        picks: Int[Array, "B T X"],
        gates: Float[Array, "B T X"],
        kept: Bool[Array, "B T X"] | None,
        stats: Stats,
        collect: bool,
    ) -> Routing:
        """Return the routing over all experts, the always-on first."""
        choices, shared = picks + self.num_shared, self.num_shared
        if shared:
            shape = (*picks.shape[:-1], shared)
            on = jnp.broadcast_to(jnp.arange(shared), shape).astype(picks.dtype)
            choices = jnp.concatenate([on, choices], axis=-1)
            gates = jnp.concatenate([jnp.ones(shape, gates.dtype), gates], axis=-1)
            if kept is not None:
                kept = jnp.concatenate([jnp.ones(shape, bool), kept], axis=-1)
        if collect:
            seen = choices if kept is None else jnp.where(kept, choices, -1)
            stats = {**stats, "choices": seen}
        return Routing(choices, gates, stats, kept)

    def pack(self, routing: Routing) -> Packing:
        """Return the packed rows of a routing."""
        return pack_choices(routing.choices, self.num_experts, routing.kept)


class PatchRouter(Router):
    """Each token, or patch of tokens, picks its `top_k` experts by score.

    Scores are float32 products of the normalised input. In a causal model a patch
    follows the decision of its first token, otherwise the mean of its tokens' scores;
    gates always come from a token's own scores. No choice looks ahead or at another
    sample. Without a capacity exactly B*T*X rows result: none dropped, none padded.
    With one, an expert of a training batch takes a sample's first
    `capacity_factor * T * X/E` tokens, of the T that aren't padding, and the others
    lose that pick.
    """

    def __init__(
        self,
        d_model: int,
        config: UnionConfig | MoeConfig,
        causal: bool,
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(d_model, config, causal, rngs=rngs)
        self.patch_size = getattr(config, "patch_size", 1)

    @property
    def sees_one_token(self) -> bool:
        """Whether a token's routing depends on nothing but that token."""
        return self.patch_size == 1

    @staticmethod
    def state_shapes(config: Any, batch: int) -> dict[str, tuple[Any, str]]:
        """Return shape and dtype of the picks that the current patch holds."""
        if getattr(config, "patch_size", 1) == 1:
            return {}
        return {"picks": ((batch, config.top_k - config.num_shared), "int32")}

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Routing:
        """Return the routing of every token."""
        if self._is_plain(context) and kernel_pays(x, self.weight[...]):
            return self._in_kernels(x, context)
        scores = self.scores(x)
        decision = scores
        if self.patch_size > 1:
            leaders = patch_leaders(x.shape[:2], context.segments, self.patch_size)
            decision = patch_scores(scores, leaders, self.causal)
        picks = self.choose(decision)
        routing = self.route(
            scores, decision, picks, self.gates(scores, picks), context
        )
        if context.lengths is None or self.patch_size == 1:
            return routing
        # A prompt that ends with its patch needs no leader: clip, don't branch.
        start = context.lengths - context.lengths % self.patch_size
        leader = jnp.minimum(start, x.shape[1] - 1)[:, None, None]
        held = jnp.take_along_axis(picks, leader, axis=1)[:, 0]
        return routing._replace(stats={**routing.stats, "state": {"picks": held}})

    def _is_plain(self, context: Context) -> bool:
        """Whether tokens have no patches, no capacity, and all of `top_k` on.

        A class that chooses, weighs or counts by methods of its own isn't plain.
        """
        own = any(getattr(type(self), n) is not getattr(PatchRouter, n) for n in _RULES)
        drawn = self.least and context.draw is not None
        limited = self.capacity_factor is not None and context.train
        return self.patch_size == 1 and not (own or drawn or limited)

    def _in_kernels(self, x: Float[Array, "B T D"], context: Context) -> Routing:
        """Return the routing that `__call__` does, by one operation."""
        counted, shape = context.counted, x.shape[:2]
        found = pick_experts(
            x.reshape(-1, x.shape[-1]),
            self.weight[...],
            self.bias[...],
            self.top_k,
            None if counted is None else counted.reshape(-1),
        )
        picks, scores = (a.reshape(*shape, -1) for a in (found.picks, found.scores))
        sums = {"picks": found.counts, "probs": found.probs, "dropped": jnp.zeros(())}
        sums |= {"z": found.z, "entropy": found.entropy}
        stats = stats_of_means(means_of_sums(sums, shape, context), self.top_k)
        gates = gate_values(scores, self.gate)
        return self.finish(picks, gates, None, stats, context.collect_choices)

    def decode(
        self, x: Float[Array, "B D"], state: State, lengths: Int[Array, " B"]
    ) -> tuple[Routing, State]:
        """Route token `lengths` of each row: a patch's first token decides for it."""
        scores = self.scores(x)
        picks = self.choose(scores)
        if self.patch_size > 1:
            first = (lengths % self.patch_size == 0)[:, None]
            picks = jnp.where(first, picks, state["picks"])
            state = {"picks": picks}
        gates = self.gates(scores, picks)
        return self.finish(picks[:, None], gates[:, None], None, {}, False), state


# What a router's kernels compute as these methods of it do.
_RULES = ("scores", "choose", "choose_by", "gates", "route")


def drawn_picks(
    key: jax.Array, least: int, picks: Int[Array, "B T X"]
) -> Bool[Array, "B T X"]:
    """Return which picks are on where `least` to X experts are drawn for all tokens.

    The first ones: they are what a router of so small a `top_k` picks (Matryoshka
    MoE, Wang et al. 2025).
    """
    most = picks.shape[-1]
    count = jax.random.randint(key, (), least, most + 1)
    return jnp.broadcast_to(jnp.arange(most) < count, picks.shape)


def gates_of_some(
    gates: Float[Array, "B T X"], on: Bool[Array, "B T X"], gate: str
) -> Float[Array, "B T X"]:
    """Return the gates as they are where only the picks that are `on` were chosen."""
    gates = jnp.where(on, gates, jnp.zeros_like(gates))
    if gate != "softmax":
        return gates
    count = jnp.sum(on, axis=-1, keepdims=True).astype(gates.dtype)
    return gates * count / jnp.sum(gates, axis=-1, keepdims=True)


def gate_values(scores: Float[Array, "*N X"], gate: Gate | str) -> Float[Array, "*N X"]:
    """Return what multiplies each chosen expert's output.

    sigmoid: `2 sigmoid(score)`, 1 at score 0. softmax: softmax over the chosen, times
    X. straight_through: exactly 1, with the gradient of `2 sigmoid(score)`. relu: 4
    times the score where it is positive, so about 1 at the start (Wang et al. 2024,
    ReMoE): no step where an expert comes in.
    """
    return choose("gate", gate, _GATES)(scores)


def _softmax(scores: Array) -> Array:
    return jax.nn.softmax(scores, axis=-1) * scores.shape[-1]


def _sigmoid(scores: Array) -> Array:
    return 2.0 * jax.nn.sigmoid(scores)


def _straight_through(scores: Array) -> Array:
    value = _sigmoid(scores)
    return 1.0 + (value - jax.lax.stop_gradient(value))


def _relu(scores: Array) -> Array:
    return 4.0 * jax.nn.relu(scores)


_GATES = {
    "relu": _relu,
    "softmax": _softmax,
    "sigmoid": _sigmoid,
    "straight_through": _straight_through,
}


def patch_scores(
    scores: Float[Array, "B T E"], leaders: Int[Array, "B T"], causal: bool
) -> Float[Array, "B T E"]:
    """Return the scores each token's patch decides by."""
    if causal:
        return jnp.take_along_axis(scores, leaders[..., None], axis=1)

    def mean(scores: Array, leaders: Array) -> Array:
        total = jnp.zeros_like(scores).at[leaders].add(scores)
        count = jnp.zeros_like(scores[:, :1]).at[leaders].add(1.0)
        return (total / jnp.maximum(count, 1.0))[leaders]

    return jax.vmap(mean)(scores, leaders)


def room_of(
    share: float, length: int, segments: Int[Array, "B T"] | None
) -> int | Int[Array, " B"]:
    """Return the tokens there is room for: a share of each sample's, padding left out.

    More padding then changes nothing.
    """
    if segments is None:
        return int(rooms(share, length)[length])
    return jnp.asarray(rooms(share, length))[jnp.sum(segments != 0, axis=1)]


def rooms(share: float, length: int) -> Int[np.ndarray, " T1"]:
    """Return the room for a share of 0 to `length` tokens, rounded up.

    A table, as float32 products that should be whole aren't those of the host.
    """
    return np.ceil(share * np.arange(length + 1) - 1e-6).astype(np.int32)


def within_capacity(
    picks: Int[Array, "B T X"],
    num_experts: int,
    room: int | Int[Array, " B"],
    segments: Int[Array, "B T"] | None,
) -> Bool[Array, "B T X"]:
    """Return which picks fit when each expert takes a sample's first `room` tokens.

    In order of position (GShard, Lepikhin et al. 2020, algorithm 1), so that no token
    depends on a later one. Padding takes no room and fits nowhere.
    """
    one_hot = jax.nn.one_hot(picks, num_experts, dtype=jnp.int32)
    if segments is not None:
        one_hot = one_hot * (segments != 0).astype(jnp.int32)[..., None, None]
    taken = jnp.cumsum(jnp.sum(one_hot, axis=2), axis=1)[:, :, None]
    if not isinstance(room, int):
        room = room[:, None, None, None]
    fits = one_hot * (taken <= room).astype(jnp.int32)
    return jnp.sum(fits, axis=-1) > 0
