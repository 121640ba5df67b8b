"""Segment attention on Hopper GPUs: warp-specialised kernels that follow the segments.

One warpgroup brings blocks into shared memory while two others multiply them and take
softmax by turns (FlashAttention-3, arXiv 2407.08608). Which tiles there are is computed
on the device from the offsets; every shape is static.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from uoe_jax.ops.segment_attention.call import Call, Mask
from uoe_jax.ops.segment_attention.nvidia import schedule
from uoe_jax.ops.segment_attention.nvidia.limits import check_call
from uoe_jax.ops.segment_attention.nvidia.mosaic_forward import forward
from uoe_jax.ops.segment_attention.nvidia.mosaic_key_gradients import (
    QUERIES,
    key_gradients,
)
from uoe_jax.ops.segment_attention.nvidia.mosaic_parts import WG_ROWS, Options
from uoe_jax.ops.segment_attention.nvidia.mosaic_query_gradient import query_gradient
from uoe_jax.ops.segment_attention.sinks import beside_sink
from uoe_jax.varying import vary_together, zeros_varying

WGS = 2  # warpgroups that compute
TILE = WGS * WG_ROWS
HOPPER = "9.0"
WIDTHS = (64, 128)  # of a head
_interpreted = contextvars.ContextVar("interpreted", default=False)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sides of the blocks that stream past a tile, and how many are in flight."""

    forward: Options
    query: Options
    key: Options
    deterministic: bool


@contextlib.contextmanager
def interpreted(params: plgpu.InterpretGPUParams | None = None) -> Iterator[None]:
    """Run the kernels on this machine's processor: slow, for checking them."""
    token = _interpreted.set(True)
    try:
        with plgpu.force_gpu_interpret_mode(params or plgpu.InterpretGPUParams()):
            yield
    finally:
        _interpreted.reset(token)


def segment_attention(
    call: Call, *, deterministic: bool = True
) -> Float[Array, "M G H"]:
    """Return attention inside each segment; see `attend`."""
    out, lse = attend(call, deterministic=deterministic)
    call = call.together()
    if call.sink is None:
        return out
    return beside_sink(out, lse, call.sink, call.real[:, None])


def attend(
    call: Call, *, deterministic: bool = True
) -> tuple[Float[Array, "M G H"], Float[Array, "M G"]]:
    """Return attention inside each segment, and the logsumexp of each row's scores.

    With `deterministic` gradients are the same bits on every run, from two kernels that
    each compute the scores. Otherwise one kernel adds up the queries' gradient in any
    order: 5 products instead of 7, but measured slower (docs/kernels/attention.md).

    Raises:
      NotImplementedError: no Hopper GPU, or a dtype, head width or scale that the
        kernels don't take.
    """
    cores = _cores()
    check_call(call, WIDTHS)
    num_rows, groups, width = call.q.shape
    if num_rows == 0:
        return call.q, jnp.zeros((0, groups), jnp.float32)
    mask = call.mask.among(num_rows)
    settings = make_settings(
        width, cores, mask=mask, scale=float(call.scale), deterministic=deterministic
    )
    call = call.together()
    # Copies of tiles want whole groups of rows.
    more = -num_rows % schedule.ALIGN
    q, k, v = call.q, call.k, call.v
    if more:
        q, k, v = (_pad_rows(x, more) for x in (q, k, v))
    rows = None
    if call.bounds is not None:
        rows = schedule.make_rows(call.offsets, call.bounds, mask, pad=TILE + more)
    out, lse = _attention(settings, q, k, v, call.offsets, rows)
    return out[:num_rows], lse[:num_rows]


def make_settings(
    width: int, cores: int, *, mask: Mask, scale: float, deterministic: bool
) -> Settings:
    """Return the tiles of the three kernels for heads of `width`."""
    common = {
        "mask": mask,
        "scale": scale,
        "consumers": WGS,
        "cores": cores,
        "registers": 240,  # with the producer's, all that a multiprocessor has
        "interpreted": _interpreted.get(),
    }
    small = width == 64
    key_stages = 3 if small else 2
    if deterministic:  # else the gradients of scores are in shared memory as well
        key_stages += 1
    return Settings(
        forward=Options(key_block=128, stages=4 if small else 2, **common),
        query=Options(key_block=64, stages=4 if small else 3, **common),
        key=Options(key_block=TILE, stages=key_stages, **common),
        deterministic=deterministic,
    )


def _cores() -> int:
    """Return the multiprocessors to fill, or say why there are none."""
    if _interpreted.get():
        return 1  # the interpreter runs them one by one anyway
    if jax.default_backend() not in ("gpu", "cuda"):
        raise NotImplementedError(f"it needs a Hopper GPU, not {jax.default_backend()}")
    device = jax.devices()[0]
    if device.compute_capability != HOPPER:
        raise NotImplementedError(
            f"it needs a Hopper GPU (compute capability {HOPPER}), not "
            f"{device.device_kind} ({device.compute_capability})"
        )
    return device.core_count


def _segments(options, q, offsets, rows):
    return schedule.Segments(offsets, q.shape[0], options.mask, rows, options.cores)


def _pad_rows(x: jax.Array, more: int) -> jax.Array:
    return jnp.pad(x, ((0, more), *((0, 0),) * (x.ndim - 1)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings, q, k, v, offsets, rows):
    return _attention_fwd(settings, q, k, v, offsets, rows)[0]


# Under jit, so that layers of one shape share a kernel: each takes seconds to lower.
@partial(jax.jit, static_argnums=0)
def _attention_fwd(settings, q, k, v, offsets, rows):
    options = settings.forward
    segments = _segments(options, q, offsets, rows)
    plan = schedule.query_plan(segments, TILE, options.key_block)
    slots = schedule.num_tiles(q.shape[0], offsets.shape[0] - 1, TILE)
    # Kernels don't say over which mesh axes their outputs vary: as their inputs do.
    _, out, lse = vary_together(q, *forward(q, k, v, plan, rows, slots, options))
    results = out, _by_rows(offsets, lse, q.shape[0])
    return results, (q, k, v, offsets, rows, plan, out, lse)


@partial(jax.jit, static_argnums=0)
def _attention_bwd(settings, saved, grads):
    q, k, v, offsets, rows, query_plan, out, lse = saved
    dout, dlse = grads
    stats = lse, _delta(offsets, dout, out, dlse)
    options = settings.key
    segments = _segments(options, q, offsets, rows)
    plan = schedule.key_plan(segments, TILE, QUERIES)
    args = q, k, v, dout, stats
    if settings.deterministic:
        dk, dv = key_gradients(*args, plan, rows, options)
        ratio = settings.forward.key_block // settings.query.key_block
        query_plan = schedule.smaller_blocks(query_plan, ratio)
        dq = query_gradient(*args, query_plan, rows, settings.query)
    else:
        shape = q.shape[0] + QUERIES, *q.shape[1:]  # whole blocks may pass the end
        total = jax.new_ref(jnp.zeros(shape, jnp.float32))
        dk, dv = key_gradients(*args, plan, rows, options, total)
        dq = (total[...][: q.shape[0]] * options.scale).astype(q.dtype)
    _, *found = vary_together(q, dq, dk, dv)
    return *found, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _delta(
    offsets: Int[Array, " S1"],
    dout: Float[Array, "M G H"],
    out: Float[Array, "M G H"],
    dlse: Float[Array, "M G"],
) -> Float[Array, "G N2"]:
    """Return rowsum(dout * out) by slots of query tiles, less the gradient of the
    logsumexp: the scores' gradient is p * (dp - delta), and that of their logsumexp p.
    """
    rows = schedule.slot_rows(offsets, out.shape[0], TILE)
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=2)
    rows = jnp.pad(rows, (0, TILE))  # and a slot for no tile
    return (delta - dlse).T.at[:, rows].get(mode="clip")


def _by_rows(
    offsets: Int[Array, " S1"], lse: Float[Array, "G N2"], num_rows: int
) -> Float[Array, "M G"]:
    """Return the logsumexp of each row, of base e, from that of base 2 by slots."""
    rows = schedule.own_rows(offsets, num_rows, TILE)
    lse = lse[:, : rows.shape[0]].T * math.log(2)
    found = zeros_varying((num_rows, lse.shape[1]), jnp.float32, lse)
    return found.at[rows].set(lse, mode="drop", unique_indices=True)
