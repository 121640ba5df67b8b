"""Segment attention on NVIDIA GPUs from Ampere on, in Triton.

FlashAttention-2 (arXiv 2307.08691) over the schedule of the Hopper kernels: tiles that
never straddle two segments, found on the device, longest first. A program works on one
tile, and every sum has one program, so values and gradients repeat bit by bit.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uoe_jax.ops import measured, nvidia
from uoe_jax.ops.segment_attention.call import Call, Mask
from uoe_jax.ops.segment_attention.nvidia import schedule
from uoe_jax.ops.segment_attention.nvidia.limits import check_call
from uoe_jax.ops.segment_attention.sinks import beside_sink

WIDTHS = (16, 32, 64, 128, 256)  # of a head
LOG2E = 1.4426950408889634


class Tiles(NamedTuple):
    """Sides of one kernel's tiles, and how it is compiled."""

    rows: int  # of a program's tile
    block: int  # rows of the other side that stream past it, a block at a time
    num_warps: int
    num_stages: int


class Settings(NamedTuple):
    """Everything static about one call; part of jit's cache key."""

    mask: Mask
    scale: float
    forward: Tiles
    query_gradient: Tiles
    key_gradients: Tiles


# By kernel and head width, largest first; narrower heads take those of 64.
DEFAULTS = {
    "forward": {
        64: [Tiles(128, 64, 4, 3)],
        128: [Tiles(128, 64, 8, 3)],
        256: [Tiles(64, 32, 8, 3), Tiles(64, 32, 8, 2)],
    },
    "query_gradient": {
        64: [Tiles(128, 32, 4, 3)],
        128: [Tiles(128, 64, 8, 3), Tiles(128, 32, 8, 3)],
        256: [Tiles(64, 32, 8, 2), Tiles(64, 16, 8, 2)],
    },
    "key_gradients": {
        64: [Tiles(128, 32, 8, 3)],
        128: [Tiles(128, 32, 8, 3)],
        256: [Tiles(64, 32, 8, 2), Tiles(32, 32, 4, 2)],
    },
}


def segment_attention(call: Call) -> Float[Array, "M G H"]:
    """Return attention inside each segment; see `attend`."""
    out, lse = attend(call)
    call = call.together()
    if call.sink is None:
        return out
    return beside_sink(out, lse, call.sink, call.real[:, None])


def attend(call: Call) -> tuple[Float[Array, "M G H"], Float[Array, "M G"]]:
    """Return attention inside each segment, and the logsumexp of each row's scores.

    Raises:
      NotImplementedError: no fit device or package, or a dtype, head width or scale
        that the kernels don't take.
    """
    nvidia.require(call.q.dtype)
    check_call(call, WIDTHS)
    if call.q.size == 0:
        return call.q, jnp.zeros(call.q.shape[:2], jnp.float32)
    mask = call.mask.among(call.q.shape[0])
    settings = make_settings(call.q, mask, float(call.scale))
    call = call.together()
    rows = None
    if call.bounds is not None:
        rows = schedule.make_rows(call.offsets, call.bounds, mask, pad=0)
    return _attention(settings, call.q, call.k, call.v, call.offsets, rows)


def make_settings(q: Float[Array, "M G H"], mask: Mask, scale: float) -> Settings:
    """Return the tiles of the three kernels: measured near this shape, or that fit."""
    num_rows, groups, width = q.shape
    shape = {"rows": num_rows, "groups": groups, "width": width}
    shape |= {"causal": mask.causal, "dtype": q.dtype.name}
    names = ("forward", "query_gradient", "key_gradients")
    return Settings(mask, scale, *(choose_tiles(x, shape) for x in names))


def choose_tiles(kernel: str, shape: dict[str, Any]) -> Tiles:
    """Return the tile that measured fastest near this shape, or one that must fit.

    Outside the tables it is the first of `DEFAULTS` that shared memory holds; all of
    them compile without spilled registers (docs/kernels/attention.md).
    """
    found = measured.tiles(f"segment_attention_{kernel}", shape)
    if found is not None:
        return Tiles(**found)
    width, itemsize = shape["width"], jnp.dtype(shape["dtype"]).itemsize
    memory = nvidia.shared_memory()
    return next(
        tiles
        for tiles in DEFAULTS[kernel][max(64, width)]
        if shared_bytes(kernel, width, itemsize, tiles) <= memory
    )


def shared_bytes(kernel: str, width: int, itemsize: int, tiles: Tiles) -> int:
    """Return the most bytes of shared memory that a program takes.

    On Ampere and Ada; Hopper's products hold one block more in flight.
    """
    own = 1 if kernel == "forward" else 2  # arrays of the tile: q; q, dout; or k, v
    streamed = 2 * max(1, tiles.num_stages - 1) * tiles.block  # rows of two arrays
    total = (own * tiles.rows + streamed) * width * itemsize
    if tiles.rows < 128:  # warps share rows, and exchange weights
        total += tiles.rows * tiles.block * itemsize
    if kernel == "key_gradients":
        # Per streamed query its logsumexp and rowsum(dout * out), low and high.
        total += 8 * streamed
    return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings, q, k, v, offsets, rows):
    return _attention_fwd(settings, q, k, v, offsets, rows)[0]


def _attention_fwd(settings, q, k, v, offsets, rows):
    segments, tiles = _segments(settings, q, offsets, rows), settings.forward
    plan = schedule.query_plan(segments, tiles.rows, tiles.block)
    shapes = [(q.shape, q.dtype), (q.shape[1::-1], jnp.float32)]
    out, lse = _launch("forward", settings, (q, k, v), plan, rows, shapes)
    results = out, lse.T * math.log(2)  # the kernel's is of base 2
    return results, (q, k, v, offsets, rows, plan, out, lse)


def _attention_bwd(settings, saved, grads):
    q, k, v, offsets, rows, plan, out, lse = saved
    grad, dlse = grads
    delta = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=2)
    # The scores' gradient is p * (dp - delta), and that of their logsumexp p.
    delta = (delta - dlse).T
    args = q, k, v, grad, lse, delta
    segments = _segments(settings, q, offsets, rows)
    tiles, known = settings.query_gradient, settings.forward
    if tiles.rows == known.rows and known.block % tiles.block == 0:
        plan = schedule.smaller_blocks(plan, known.block // tiles.block)
    else:
        plan = schedule.query_plan(segments, tiles.rows, tiles.block)
    of_query, of_key = (q.shape, q.dtype), (k.shape, k.dtype)
    (dq,) = _launch("query_gradient", settings, args, plan, rows, [of_query])
    tiles = settings.key_gradients
    plan = schedule.key_plan(segments, tiles.rows, tiles.block)
    dk, dv = _launch("key_gradients", settings, args, plan, rows, [of_key] * 2)
    return dq, dk, dv, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _segments(settings, q, offsets, rows):
    # One core: every round of the plan is a program of its own, longest first.
    return schedule.Segments(offsets, q.shape[0], settings.mask, rows, cores=1)


def _launch(
    name: str,
    settings: Settings,
    arrays: tuple[jax.Array, ...],
    plan: schedule.Plan,
    rows: schedule.Rows | None,
    out_shape: list[tuple[tuple[int, ...], Any]],
) -> list[jax.Array]:
    """Return what a kernel writes, started once for each tile (of each query head)."""
    from uoe_jax.ops.segment_attention.nvidia import triton_backward, triton_forward

    table = plan.tiles.reshape(-1, schedule.COLUMNS)
    kernels = triton_forward if name == "forward" else triton_backward
    num_rows, groups, width = arrays[0].shape
    tiles: Tiles = getattr(settings, name)
    scales = {"FACTOR": settings.scale * LOG2E}
    if name != "forward":
        scales["SCALE"] = settings.scale
    run = functools.partial(
        nvidia.launch,
        getattr(kernels, name),
        out_shape=out_shape,
        grid=table.shape[0] * (1 if name == "key_gradients" else groups),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        M=num_rows,
        G=groups,
        H=width,
        **scales,
        CAUSAL=settings.mask.causal,
        WINDOW=settings.mask.window or 0,
        BOUNDS=rows is not None,
        ALIGN=schedule.ALIGN,
        ROWS=tiles.rows,
        BLOCK=tiles.block,
    )
    # A bridge to triton has no rule for vmap.
    return jax.custom_batching.sequential_vmap(run)(
        *arrays, table, *(rows or (table, table))
    )
