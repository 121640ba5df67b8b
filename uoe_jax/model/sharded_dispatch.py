"""Running a block's parts on the devices of a tensor group."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uoe_jax.model.context import Context
from uoe_jax.model.linear import rows_to_picks
from uoe_jax.model.mlp import RoutedMlp
from uoe_jax.model.router import Routing
from uoe_jax.ops.packing import gather_rows, pack_choices
from uoe_jax.partition.collectives import Parallel, vary_over


def run_part(part: Any, x: Float[Array, "B T D"], context: Context) -> tuple[Any, ...]:
    """Return a part's results, with the collectives of the layout around it.

    Each device computes its experts, or its heads and columns; their sum is the output.
    """
    parallel = context.parallel
    if parallel is None or not parallel.has("tensor"):
        return part(x, context)
    parallel.check_split(part)
    if parallel.dispatches and isinstance(part, RoutedMlp):
        return dispatch(part, x, context)
    x = parallel.spread(x)
    if not hasattr(part, "router"):
        # Cast once for all products of x: their gradients then take one sum together.
        x = vary_over(x, ("tensor",))
    y, *rest = part(x, context)
    return parallel.combine(y), *rest


def dispatch(
    mlp: RoutedMlp, x: Float[Array, "B T D"], context: Context
) -> tuple[Float[Array, "B T D"], Any]:
    """Return a routed MLP's output and statistics, rows sent to their experts and back.

    Each device routes its share of the tokens (GShard, Lepikhin et al. 2020, section
    3.2). There is room for every row, so nothing is dropped.
    """
    parallel = context.parallel
    assert parallel is not None
    own = x if parallel.scatters else parallel.own_tokens(x)
    segments = context.segments
    inner = context._replace(
        positions=parallel.own_tokens(context.positions),
        segments=None if segments is None else parallel.own_tokens(segments),
        axis_name=(*parallel.token_axes, "tensor"),
    )
    routing = mlp.router(own, inner)
    y = _exchange(mlp, own.reshape(-1, own.shape[-1]), routing, parallel)
    if mlp.b_down is not None:  # held by the first device only
        bias = jax.lax.psum(mlp.b_down[...], "tensor")
        y = y + bias.astype(y.dtype)[None]
    y = y.reshape(own.shape)
    if not parallel.scatters:
        y = jax.lax.all_gather(y, "tensor", axis=1, tiled=True, to="invarying")
    return y, routing.stats


def _exchange(
    mlp: RoutedMlp, x: Float[Array, "N D"], routing: Routing, parallel: Parallel
) -> Float[Array, "N D"]:
    """Return each token's sum of its gated experts, wherever they are."""
    tensor, experts = parallel.size("tensor"), mlp.w_up.shape[0]
    num_experts, width = mlp.router.num_experts, x.shape[1]
    picks = routing.choices.shape[-1]
    place = routing.choices
    if parallel.layout.deals:
        place = place % tensor * experts + place // tensor
    # Rows sorted by the place of their expert are sorted by its device.
    packing = pack_choices(place, num_experts)
    starts = packing.group_offsets[::experts]
    room = x.shape[0] * min(picks, experts)
    slot = jnp.arange(room, dtype=jnp.int32)
    row = starts[:-1, None] + slot[None]
    filled = row < starts[1:, None]
    rows = gather_rows(x, packing)
    sent = rows.at[jnp.where(filled, row, rows.shape[0])].get(mode="fill", fill_value=0)
    counts = jnp.diff(packing.group_offsets).reshape(tensor, experts)
    swap = lambda a: jax.lax.all_to_all(a, "tensor", 0, 0)
    received, ends = swap(sent), jnp.cumsum(swap(counts), axis=1)
    expert = jnp.sum(slot[None, :, None] >= ends[:, None], axis=-1).reshape(1, -1, 1)
    local = pack_choices(expert, experts, expert < experts)
    out = mlp.experts(received.reshape(-1, width), local)
    back = swap(out.reshape(tensor, room, width)).reshape(-1, width)
    index = jnp.arange(rows.shape[0], dtype=jnp.int32)
    device = jnp.searchsorted(starts[1:], index, side="right").astype(jnp.int32)
    back = back.at[device * room + index - starts[device]].get(
        unique_indices=True, mode="promise_in_bounds"
    )
    parts = rows_to_picks(back, packing)
    gates = routing.gates.reshape(-1, picks, 1)
    return jnp.sum(parts * gates.astype(parts.dtype), axis=1)
