"""Segment attention on TPU: three Pallas kernels, checked without a TPU.

Rows, offsets and what is seen are data; every shape is static. FlashAttention-2 (arXiv
2307.08691).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from uoe_jax.ops import tpu
from uoe_jax.ops.segment_attention.call import Call, Mask
from uoe_jax.ops.segment_attention.sinks import beside_sink
from uoe_jax.ops.segment_attention.tpu.backward import (
    key_gradients,
    query_gradient,
)
from uoe_jax.ops.segment_attention.tpu.forward import forward
from uoe_jax.ops.segment_attention.tpu.schedule import segment_edges
from uoe_jax.ops.tpu import LANES, Target, round_up
from uoe_jax.varying import vary_together


@dataclass(frozen=True)
class Options:
    """Everything static about one call; part of jit's cache key."""

    target: Target
    causal: bool
    window: int | None
    scale: float
    rows: int  # queries of a tile (forward and dq)
    chunk: int  # keys streamed past it at a time
    key_rows: int  # keys of a tile (dk and dv)
    key_chunk: int  # queries streamed past it
    vmem: int  # bytes that the tiles need
    pairs: int  # score entries of a head if segments are equally long

    def cost(self, q: jax.Array, *, products: int, arrays: int) -> pl.CostEstimate:
        """Return the work told to the compiler, which can't see the offsets."""
        groups, num_rows, width = q.shape
        entries = self.pairs * groups
        return pl.CostEstimate(
            flops=2 * products * entries * width,
            transcendentals=entries,
            bytes_accessed=arrays * num_rows * groups * width * q.dtype.itemsize,
        )


def segment_attention(call: Call) -> Float[Array, "M G H"]:
    """Return attention inside each segment.

    Bounds cut segments in shorter runs: rows that see each other have equal bounds.

    Raises:
      NotImplementedError: no TPU, or a dtype or head width the kernels don't take.
    """
    edges = partial(_run_edges, call.offsets, call.bounds)
    runs = Runs(edges, call.offsets.shape[0] - 1)
    return attend(call, runs)


def _run_edges(offsets, bounds, num_rows):
    """Return the first and end row of each row's run inside its segment."""
    edges = segment_edges(offsets, num_rows)
    if bounds is None:
        return edges
    first, last = (tpu.pad_rows(x.astype(jnp.int32), num_rows) for x in bounds)
    start, end = jnp.maximum(edges[0], first), jnp.minimum(edges[1], last + 1)
    real = edges[1] > edges[0]
    return jnp.stack([jnp.where(real, start, 0), jnp.where(real, end, 0)])


class Runs(NamedTuple):
    """Runs of rows that see each other, as known at every row.

    `edges` takes a number of rows, at least M, and returns the first and end row of
    each row's run; `count` is about how many there are, for the choice of tiles.
    """

    edges: Callable[[int], Int[Array, "2 M2"]]
    count: int


def attend(call: Call, runs: Runs) -> Float[Array, "M G H"]:
    """Return attention inside runs of rows, whatever the call's segments are.

    Raises:
      NotImplementedError: as `segment_attention`.
    """
    target = tpu.current_target()
    q, k, v, mask, scale = call.q, call.k, call.v, call.mask, call.scale
    num_rows, groups, width = q.shape
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"TPUs multiply bfloat16 or float32, not {q.dtype}")
    if width > 256 or width % 8:
        raise NotImplementedError(
            f"heads of {width}; it takes multiples of 8 up to 256"
        )
    if num_rows == 0:
        return q
    shape = num_rows, groups, width
    options = make_options(target, shape, q.dtype, runs.count, mask=mask, scale=scale)
    padded = round_up(num_rows, max(options.rows, options.key_rows))
    q, k, v, ends = vary_together(q, k, v, runs.edges(padded))
    heads = tpu.pad_rows(q.transpose(1, 0, 2), padded, axis=1)
    k, v = tpu.pad_rows(k, padded), tpu.pad_rows(v, padded)
    sink = call.sink
    if sink is not None:
        sink = tpu.pad_rows(vary_together(sink, q)[0].T, padded, axis=1)
    out, lse = _attention(options, heads, k, v, ends)
    if sink is not None:
        out = beside_sink(out, lse, sink, ends[1] > ends[0])
    return out[:, :num_rows].transpose(1, 0, 2)


def make_options(
    target: Target,
    shape: tuple[int, int, int],
    dtype: Any,
    num_segments: int,
    *,
    mask: Mask,
    scale: float,
) -> Options:
    """Return tile sides for queries of `[M, G, H]`: tuned or modelled."""
    num_rows, groups, width = shape
    causal, window = mask
    # Offsets of about one entry a row only bound the number of documents.
    count = num_segments if num_segments * LANES <= num_rows else 1
    mean = max(1, num_rows // count)
    reach = mean if window is None else min(mean, window)
    modelled = _model_tiles(target, shape, dtype, reach)
    call = {
        "length": reach,
        "groups": groups,
        "width": width,
        "causal": causal,
        "dtype": jnp.dtype(dtype).name,
    }
    sides = tpu.choose("segment_attention", call, target, modelled)
    # No tile larger than the rows there are.
    most = 1 << (round_up(num_rows, LANES) // LANES).bit_length() - 1
    sides = {name: min(side, most * LANES) for name, side in sides.items()}
    seen = min(reach, (mean + 1) / 2 if causal else mean)
    return Options(
        target=target,
        causal=causal,
        window=window,
        scale=scale,
        vmem=tile_bytes(sides, groups, width, dtype),
        pairs=int(num_rows * seen),
        **sides,
    )


def _model_tiles(target, shape, dtype, reach):
    """Return the largest tiles that fit and don't waste short segments."""
    _, groups, width = shape
    # From schedules: larger tiles hide more latency but waste more at the edges.
    sides = {
        "rows": LANES if groups > 1 else 256 if reach < 8192 else 512,
        "chunk": 512 if reach < 2048 else 1024,
        "key_rows": 256 if reach < 8192 else 512,
        "key_chunk": 512 if reach < 2048 else 1024,
    }
    for name in sides:
        while sides[name] > LANES and sides[name] > reach:
            sides[name] //= 2
    budget = target.generation.vmem_budget
    while tile_bytes(sides, groups, width, dtype) > budget:
        largest = max(sides, key=lambda name: sides[name])
        if sides[largest] == LANES:
            raise NotImplementedError(
                f"{groups} query heads of {width} need more than "
                f"{budget // tpu.MIB} MiB of {target.generation.name}'s VMEM"
            )
        sides[largest] //= 2
    return sides


def tile_bytes(sides: dict[str, int], groups: int, width: int, dtype) -> int:
    """Return the VMEM that the largest of the three kernels needs, in bytes."""
    size = tpu.vmem_bytes
    rows, chunk = groups * sides["rows"], sides["chunk"]
    f32 = jnp.float32
    # Blocks are double-buffered by the pipeline, chunks by the ring.
    query = (
        size((rows, width), dtype, 6)
        + size((sides["rows"], width), dtype, 4)
        + size((chunk, width), dtype, 4)
        + size((rows, LANES), f32, 4)
        + size((rows, width), f32)
        + size((rows, chunk), f32, 3)
    )
    rows, chunk = sides["key_rows"], sides["key_chunk"]
    key = (
        size((rows, width), dtype, 8)
        + size((groups * rows, width), dtype, 4)
        + size((chunk, width), dtype, 4)
        + size((rows, LANES), f32, 2)
        + size((rows, width), f32, 2)
        + size((rows, chunk), f32, 4)
    )
    return max(query, key)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options, q, k, v, edges):
    return _attention_fwd(options, q, k, v, edges)[0]


def _attention_fwd(options, q, k, v, edges):
    out, lse = forward(q, k, v, edges, options)
    results = out, lse * math.log(2)  # the kernel's is of base 2
    return results, (q, k, v, edges, out, lse)


def _attention_bwd(options, saved, grads):
    q, k, v, edges, out, lse = saved
    dout, dlse = grads
    # Rows past the last segment see nothing; what flows into them must not count.
    product = dout.astype(jnp.float32) * out.astype(jnp.float32)
    # The scores' gradient is p * (dp - delta), and that of their logsumexp p.
    delta = jnp.sum(product, axis=2) - dlse
    delta = jnp.where(edges[1] > edges[0], delta, 0)
    stats = jnp.stack([lse, delta], axis=1)
    dq = query_gradient(q, k, v, edges, dout, stats, options)
    dk, dv = key_gradients(q, k, v, edges, dout, stats, options)
    return dq, dk, dv, None


_attention.defvjp(_attention_fwd, _attention_bwd)
