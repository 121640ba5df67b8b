"""FlashAttention-2 (arXiv 2307.08691) in plain JAX; work follows the segments.

Nothing of size M x M exists: the backward pass recomputes the scores from the saved
logsumexp. Gradients of keys and values are added in place, in an order that is the same
on every run, because no two query blocks meet the same key block in the same step.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from uoe_jax.ops.numerics import accumulator_dtype
from uoe_jax.ops.segment_attention.layout import Layout, to_blocks, to_rows
from uoe_jax.ops.segment_attention.plan import (
    MASKED,
    Plan,
    contract,
    make_plan,
    take_chunk,
)
from uoe_jax.varying import vary_together, zeros_varying


class Options(NamedTuple):
    """What is fixed when the program is traced."""

    scale: float
    chunk: int  # query blocks that take a step together
    cyclic: bool  # blocks that share a key block need all the same key blocks


def blockwise_attention(
    q: Float[Array, "M G H"],
    k: Float[Array, "M H"],
    v: Float[Array, "M H"],
    layout: Layout,
    options: Options,
    sink: Float[Array, "M G"] | None = None,
) -> Float[Array, "M G H"]:
    """Return attention of every row to the rows it sees; memory linear in M."""
    leaves, tree = jax.tree.flatten((layout, sink))
    q, k, v, *leaves = vary_together(q, k, v, *leaves)
    return _attend(q, k, v, *jax.tree.unflatten(tree, leaves), options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, layout, sink, options):
    return _attend_fwd(q, k, v, layout, sink, options)[0]


def _attend_fwd(q, k, v, layout, sink, options):
    plan = make_plan(layout, options.chunk)
    sinks = None
    if sink is not None:
        blocks = to_blocks(sink.astype(accumulator_dtype(q.dtype)), layout)
        sinks = blocks.reshape(blocks.shape[0], -1)[plan.order]  # [chunks, C, R]
    out, lse = _forward(q, k, v, layout, plan, sinks, options)
    return out, (q, k, v, layout, sink, sinks, plan, out, lse)


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layout: Layout,
    plan: Plan,
    sinks: jax.Array | None,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """Return the output [M, G, H] and the logsumexp by chunks [chunks, C, R]."""
    size, dtype = layout.low.shape[1], accumulator_dtype(q.dtype)
    kb, vb = to_blocks(k, layout), to_blocks(v, layout)
    qb = _join_groups(to_blocks(q, layout))

    def run_chunk(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        chunk = take_chunk(plan, index, qb, layout)

        def step(i: jax.Array, carry: Any) -> Any:
            top, total, out = carry
            block, needed = chunk.key_block(i, options.cyclic)
            s = chunk.scores(_take(kb, block), block, needed, options.scale)
            new_top = jnp.maximum(top, s.max(axis=2))
            p = jnp.exp(s - new_top[:, :, None])
            shrink = jnp.exp(top - new_top)
            total = total * shrink + p.sum(axis=2)
            update = contract("crp,cph->crh", p.astype(v.dtype), _take(vb, block))
            return new_top, total, out * shrink[:, :, None] + update

        shape = chunk.q.shape
        top, total = (zeros_varying(shape[:2], dtype, q, x) for x in (MASKED, 0.0))
        if sinks is not None:  # seen before all keys
            top, total = sinks[index], total + 1
        start = top, total, zeros_varying(shape, dtype, q)
        steps = chunk.num_steps(options.cyclic)
        top, total, out = lax.fori_loop(0, steps, step, start)
        total = jnp.where(total == 0, 1, total)  # blocks that took no step
        return (out / total[:, :, None]).astype(q.dtype), top + jnp.log(total)

    out, lse = lax.map(run_chunk, jnp.arange(plan.order.shape[0]))
    out = out.reshape(-1, size, *q.shape[1:])
    return to_rows(out, layout, plan.places), lse


def _attend_bwd(options, saved, grad):
    q, k, v, layout, sink, sinks, plan, out, lse = saved
    size, dtype = layout.low.shape[1], accumulator_dtype(q.dtype)
    delta = (grad.astype(dtype) * out.astype(dtype)).sum(axis=2, keepdims=True)
    kb, vb = to_blocks(k, layout), to_blocks(v, layout)
    qb, gb, delta = (_join_groups(to_blocks(x, layout)) for x in (q, grad, delta))

    def run_chunk(carry: Any, index: jax.Array) -> Any:
        chunk = take_chunk(plan, index, qb, layout)
        g, d, total = gb[chunk.ids], delta[chunk.ids], lse[index][:, :, None]

        def step(i: jax.Array, carry: Any) -> Any:
            dq, dk, dv = carry
            block, needed = chunk.key_block(i, options.cyclic)
            keys, values = _take(kb, block), _take(vb, block)
            s = chunk.scores(keys, block, needed, options.scale)
            p = jnp.where(s == MASKED, 0, jnp.exp(s - total))
            ds = p * (contract("crh,cph->crp", g, values) - d) * options.scale
            p, ds = p.astype(q.dtype), ds.astype(q.dtype)
            dq = dq + contract("crp,cph->crh", ds, keys)
            # No two blocks of a step meet the same key block, so adding in place needs
            # no order. Idle entries get distinct places past the end and are dropped.
            spare = kb.shape[0] + jnp.arange(block.shape[0], dtype=block.dtype)
            place = jnp.where(needed, block, spare)
            dk = _add(dk, place, contract("crp,crh->cph", ds, chunk.q))
            dv = _add(dv, place, contract("crp,crh->cph", p, g))
            return dq, dk, dv

        start = (zeros_varying(chunk.q.shape, dtype, q), *carry)
        steps = chunk.num_steps(options.cyclic)
        dq, *carry = lax.fori_loop(0, steps, step, start)
        return tuple(carry), dq.astype(q.dtype)

    zeros = zeros_varying(kb.shape, dtype, k)
    chunks = jnp.arange(plan.order.shape[0])
    (dk, dv), dq = lax.scan(run_chunk, (zeros, zeros), chunks)
    dq = to_rows(dq.reshape(-1, size, *q.shape[1:]), layout, plan.places)
    dk, dv = (to_rows(x.astype(k.dtype), layout, None) for x in (dk, dv))
    if sink is None:
        return dq, dk, dv, None, None
    # A sink's value is zero: of its score's gradient only -delta is left.
    dsink = -jnp.exp(sinks - lse) * delta[plan.order][..., 0]
    dsink = dsink.reshape(-1, size, q.shape[1])
    dsink = to_rows(dsink.astype(sink.dtype), layout, plan.places)
    return dq, dk, dv, None, dsink


_attend.defvjp(_attend_fwd, _attend_bwd)


def _join_groups(x: jax.Array) -> jax.Array:
    """[C, P, G, H] -> [C, P * G, H]."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3])


def _take(blocks: jax.Array, index: jax.Array) -> jax.Array:
    return blocks.at[index].get(mode="clip")


def _add(total: jax.Array, place: jax.Array, update: jax.Array) -> jax.Array:
    return total.at[place].add(update, mode="drop", unique_indices=True)
