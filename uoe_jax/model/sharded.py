"""Layers whose weights or tokens are spread over devices, inside `jax.shard_map`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uoe_jax.errors import choose
from uoe_jax.model.context import Context
from uoe_jax.model.dispatch import dispatch
from uoe_jax.model.routing.token import Routing
from uoe_jax.model.sequence import (
    exchanged_attention,
    gathered_attention,
    ring_attention,
)
from uoe_jax.ops.dense_attention.api import dense_attention
from uoe_jax.ops.packing import Packing, pack_choices
from uoe_jax.ops.segment_attention.call import Mask
from uoe_jax.partition.collectives import Parallel
from uoe_jax.tree import leaf_name
from uoe_jax.varying import vary_over, vary_together


def pack_local(
    router: Any, routing: Routing, context: Context, num_local: int
) -> Packing:
    """Return the packed rows of the `num_local` experts whose weights are here.

    There is room for every token to pick all of them: nothing is dropped.
    """
    if context.parallel is None or num_local == router.num_experts:
        return router.pack(routing)
    place = context.parallel.local_expert(
        routing.choices, router.num_experts, num_local
    )
    here = (place >= 0) & (place < num_local)
    if routing.kept is not None:
        here = here & routing.kept
    batch, length, picks = place.shape
    rows = batch * length * min(picks, num_local)
    return pack_choices(place, num_local, here, rows)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    context: Context,
    sees: Mask,
    sink: Float[Array, " N2"] | None = None,
) -> Float[Array, "B T N H"]:
    """Return dense attention, to the tokens of all sequence devices."""
    parallel, segments = context.parallel, context.segments
    if parallel is None or not parallel.has("sequence"):
        causal, window = sees
        options: dict[str, Any] = {"causal": causal, "window": window, "sink": sink}
        return dense_attention(q, k, v, segments=segments, **options)
    runs = {
        "ring": ring_attention,
        "gather": gathered_attention,
        "heads": exchanged_attention,
    }
    how = parallel.layout.sequence_attention
    run = choose("layout.sequence_attention", how, runs)
    size = parallel.size("sequence")
    if sink is not None:
        sink, _ = vary_together(sink, q)
    return run(q, k, v, segments, sees=sees, sink=sink, axis="sequence", size=size)


def splits_tokens(context: Context) -> Parallel | None:
    """Return the collectives if a sample's tokens lie on several devices here."""
    parallel = context.parallel
    if parallel is None or parallel.shares_experts or not parallel.has("sequence"):
        return None
    return parallel


def route(router: Any, x: Float[Array, "B T D"], context: Context) -> Routing:
    """Return the routing of this device's tokens; a router that looks at others of the
    sample is given them."""
    one_token = router.sees_one_token
    limited = router.capacity_factor is not None and context.train
    parallel = splits_tokens(context)
    if parallel is None or (one_token and not limited):
        return router(x, context)
    whole = parallel.all_tokens(x, "sequence")
    routing = router(whole, whole_context(context, parallel))
    own = lambda a: None if a is None else parallel.own_tokens(a, "sequence")
    return routing._replace(
        choices=own(routing.choices), gates=own(routing.gates), kept=own(routing.kept)
    )


def whole_context(context: Context, parallel: Parallel) -> Context:
    """Return the context of the whole samples that sequence devices share."""
    whole = lambda a: None if a is None else parallel.all_tokens(a, "sequence")
    scored = context.scored
    if scored is not None:  # as numbers: what gathers sums has none of truths
        scored = parallel.all_tokens(scored.astype(jnp.int32), "sequence") != 0
    return context._replace(
        positions=parallel.all_tokens(context.positions, "sequence"),
        segments=whole(context.segments),
        scored=scored,
        parallel=dataclasses.replace(parallel, shares_experts=True),
    )


def share_experts(
    attention: Any, x: Float[Array, "B T D"], context: Context, parallel: Parallel
) -> tuple[Array, Any, Any]:
    """Return union attention of tokens that lie on several sequence devices.

    An expert attends among tokens of the whole sample, so tokens are gathered and the
    devices take the experts apart: no row of keys travels, no work is done twice.
    DeepSpeed-Ulysses (Jacobs et al. 2023) for heads that choose their tokens.
    """
    count, rank = parallel.size("sequence"), jax.lax.axis_index("sequence")

    def own(path: Any, leaf: Array) -> Array:
        name = leaf_name(path)
        if name.startswith(("router", "q_norm", "k_norm")):
            return leaf
        if name == "bo":
            return parallel.only_first("sequence", leaf)
        share = leaf.shape[0] // count
        return jax.lax.dynamic_slice_in_dim(leaf, rank * share, share)

    local = jax.tree_util.tree_map_with_path(own, attention)
    whole = parallel.all_tokens(x, "sequence")
    y, stats, key_value = local(whole, whole_context(context, parallel))
    return parallel.sum_tokens(y, "sequence"), stats, key_value


def run_part(part: Any, x: Float[Array, "B T D"], context: Context) -> tuple[Any, ...]:
    """Return a part's results, with the collectives of the layout around it.

    Each device computes its experts, or its heads and columns; their sum is the output.
    """
    parallel = context.parallel
    if parallel is None or not parallel.has("tensor"):
        return part(x, context)
    parallel.check_split(part)
    if parallel.dispatches and hasattr(part, "experts"):
        return dispatch(part, x, context)
    x = parallel.spread(x)
    if not hasattr(part, "router"):
        # Cast once for all products of x: their gradients then take one sum together.
        x = vary_over(x, ("tensor",))
    y, *rest = part(x, context)
    return parallel.combine(y), *rest
