"""Tokens of a routed MLP sent to the devices that hold their experts, and back.

Expert parallelism (GShard, Lepikhin et al. 2020, section 3.2), but a token travels once
to each device that it needs, however many of its experts are there, and their sum comes
back as one row. There is room for all tokens on every device, so nothing is dropped;
what is sent is what was chosen, where the machine can send so.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from uoe_jax.model.context import Context
from uoe_jax.model.routing.token import Routing
from uoe_jax.ops.packing import Packing, combine_rows, gather_rows, pack_choices
from uoe_jax.partition.collectives import Parallel
from uoe_jax.varying import vary_over, vary_together, zeros_varying

AXIS = "tensor"


def dispatch(
    mlp: Any, x: Float[Array, "B T D"], context: Context
) -> tuple[Float[Array, "B T D"], Any]:
    """Return a routed MLP's output and statistics, tokens sent to experts and back.

    Each device routes its share of the tokens.
    """
    parallel = context.parallel
    assert parallel is not None
    own = x if parallel.scatters else parallel.own_tokens(x)
    mine = lambda a: None if a is None else parallel.own_tokens(a)
    inner = context._replace(
        positions=parallel.own_tokens(context.positions),
        segments=mine(context.segments),
        scored=mine(context.scored),
        axis_name=(*parallel.token_axes, AXIS),
    )
    routing = mlp.router(own, inner)
    y = _apply(mlp, own.reshape(-1, own.shape[-1]), routing, parallel)
    if mlp.b_down is not None:  # held by the first device only
        bias = jax.lax.psum(mlp.b_down[...], AXIS)
        y = y + bias.astype(y.dtype)[None]
    y = y.reshape(own.shape)
    if not parallel.scatters:
        y = jax.lax.all_gather(y, AXIS, axis=1, tiled=True, to="invarying")
    return y, routing.stats


class Journey(NamedTuple):
    """Where N tokens have their rows in blocks of N, one for each of S devices."""

    rows: Packing
    counts: Int[Array, " S"]  # rows of each block that are used


def _apply(
    mlp: Any, x: Float[Array, "N D"], routing: Routing, parallel: Parallel
) -> Float[Array, "N D"]:
    """Return each token's sum of its gated experts, wherever they are."""
    tensor, experts = parallel.size(AXIS), mlp.w_up.shape[0]
    num_experts, tokens = mlp.router.num_experts, x.shape[0]
    picks = routing.choices.shape[-1]
    choices = routing.choices.reshape(tokens, picks)
    if routing.kept is not None:  # the others are of no expert
        choices = jnp.where(routing.kept.reshape(choices.shape), choices, num_experts)
    gather = partial(jax.lax.all_gather, axis_name=AXIS, axis=0)
    everyone = gather(vary_over(choices, (AXIS,)))
    gates = gather(vary_over(routing.gates.reshape(tokens, picks), (AXIS,)))

    leave = _leaving(choices, num_experts, parallel)
    place = parallel.local_expert(everyone, num_experts, experts)
    here = (place >= 0) & (place < experts)
    arrive = _arriving(jnp.any(here, axis=-1))

    sent = _send(gather_rows(x, leave.rows), leave.counts, arrive.counts)
    whole = combine_rows(sent, arrive.rows)
    flat = lambda a: a.reshape(1, tensor * tokens, picks)
    room = tensor * tokens * min(picks, experts)
    packing = pack_choices(flat(place), experts, flat(here), room)
    y = mlp.experts(whole, packing, flat(gates))
    back = _send(gather_rows(y, arrive.rows), arrive.counts, leave.counts)
    return combine_rows(back, leave.rows)


def _leaving(
    choices: Int[Array, "N X"], num_experts: int, parallel: Parallel
) -> Journey:
    """Return the rows of this device's tokens, a block for each device they need."""
    tensor = parallel.size(AXIS)
    local = num_experts // tensor
    owner = choices % tensor if parallel.layout.deals else choices // local
    owner = jnp.where(choices < num_experts, owner, tensor)
    device = jnp.arange(tensor, dtype=jnp.int32)
    needs = jnp.any(owner[..., None] == device[None, None], axis=1)
    rows = _number(needs.T).T
    token = jnp.arange(needs.shape[0], dtype=jnp.int32)[:, None]
    return _journey(rows, jnp.broadcast_to(token, rows.shape), needs.T)


def _arriving(needs: Bool[Array, "S N"]) -> Journey:
    """Return the rows that come from each device for the tokens that need this one."""
    rows = _number(needs)
    token = jnp.arange(rows.size, dtype=jnp.int32).reshape(-1, 1)
    return _journey(rows.reshape(-1, 1), token, needs)


def _number(needs: Bool[Array, "S N"]) -> Int[Array, "S N"]:
    """Return each needed token's row in its device's block, of others one past all."""
    devices, tokens = needs.shape
    place = jnp.cumsum(needs, axis=1, dtype=jnp.int32) - 1
    first = jnp.arange(devices, dtype=jnp.int32)[:, None] * tokens
    return jnp.where(needs, first + place, devices * tokens)


def _journey(
    rows: Int[Array, "N X"], token: Int[Array, "N X"], needs: Bool[Array, "S M"]
) -> Journey:
    ids = zeros_varying((needs.size,), jnp.int32, rows)
    ids = ids.at[rows.reshape(-1)].set(
        vary_together(token, rows)[0].reshape(-1), mode="drop"
    )
    counts = jnp.sum(needs, axis=1, dtype=jnp.int32)
    unused = counts  # a packing's offsets are for products by group
    return Journey(Packing(ids, rows, unused, unused), counts)


@jax.custom_vjp
def _send(
    rows: Float[Array, "M D"], leave: Int[Array, " S"], arrive: Int[Array, " S"]
) -> Float[Array, "M D"]:
    """Return the blocks of rows that the devices send here, in their order.

    The first `leave[d]` rows of block d go to device d, and `arrive[s]` come from
    device s; what is behind them in a block means nothing.
    """
    devices = leave.shape[0]
    size = rows.shape[0] // devices
    if not sends_what_is_chosen():
        blocks = rows.reshape(devices, size, rows.shape[1])
        return jax.lax.all_to_all(blocks, AXIS, 0, 0).reshape(rows.shape)
    begin = jnp.arange(devices, dtype=jnp.int32) * size
    there = jnp.full((devices,), size, jnp.int32) * jax.lax.axis_index(AXIS)
    begin, there, leave, arrive, rows = vary_together(begin, there, leave, arrive, rows)
    room = zeros_varying(rows.shape, rows.dtype, rows)
    return jax.lax.ragged_all_to_all(
        rows, room, begin, leave, there, arrive, axis_name=AXIS
    )


def sends_what_is_chosen() -> bool:
    """Whether devices can send numbers of rows that are known only when they run.

    XLA has no such collective on CPUs, and on two H200s its one for GPUs never ended
    (jax 0.11.2; docs/lab/products.md). The devices may be elsewhere, where a program is
    compiled ahead.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return platform == "tpu"


def _send_fwd(rows, leave, arrive):
    return _send(rows, leave, arrive), (leave, arrive)


def _send_bwd(counts, grad):
    leave, arrive = counts
    return _send(grad, arrive, leave), None, None


_send.defvjp(_send_fwd, _send_bwd)
