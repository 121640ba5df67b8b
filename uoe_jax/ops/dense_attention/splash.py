"""Plain attention on TPU by jax's own fastest kernel, splash attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import config as jax_config
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jaxtyping import Array, Float, Int

from uoe_jax.ops import tpu
from uoe_jax.ops.dense_attention.call import Call
from uoe_jax.ops.tpu import LANES, Target
from uoe_jax.varying import vary_like, vary_together


@dataclass(frozen=True)
class Options:
    """Everything static about one call; part of jit's cache key."""

    target: Target
    length: int
    heads: int
    causal: bool
    window: int | None
    block: int  # queries and keys of a tile, in all three kernels


def dense_attention(call: Call) -> Float[Array, "B T N H"]:
    """Return attention of each token to its sequence, or to its document there.

    Raises:
      NotImplementedError: no TPU, or a length, width or dtype splash doesn't take.
    """
    target = tpu.current_target()
    q, (causal, window) = call.q, call.mask
    _, length, heads, width = q.shape
    if call.sink is not None:
        raise NotImplementedError("it takes no sink")
    if length % LANES:
        raise NotImplementedError(f"length {length}; it takes multiples of {LANES}")
    if width % 64 or width > 256:
        raise NotImplementedError(f"heads of {width}; it takes 64, 128, 192 and 256")
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"TPUs multiply bfloat16 or float32, not {q.dtype}")
    block = block_side(target, q)
    options = Options(target, length, heads, causal, window, block)
    runs = None if call.segments is None else _runs(call.segments)
    # The kernel has no scale of its own.
    q = (q * call.scale).astype(q.dtype)
    given = (q, call.k, call.v) if runs is None else (q, call.k, call.v, runs)
    q, k, v, *runs = vary_together(*given)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    return _attention(options, q, k, v, *runs or [None]).transpose(0, 2, 1, 3)


def block_side(target: Target, q: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Return the side of a tile for queries `[B, T, N, H]`: it divides T."""
    _, length, _, width = q.shape
    shape = {"length": length, "width": width, "dtype": jnp.dtype(q.dtype).name}
    sides = tpu.choose("dense_attention", shape, target, {"block": 512})
    block = min(sides["block"], length)
    while length % block:
        block //= 2
    return block


def _runs(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Number the runs of equal ids: an id that comes back is another document."""
    changed = segments[:, 1:] != segments[:, :-1]
    return jnp.pad(jnp.cumsum(changed, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def _mask(options: Options) -> splash_attention_mask.Mask:
    square = (options.length, options.length)
    if options.window is not None:
        reach = options.window - 1
        sides = (reach, 0 if options.causal else reach)
        return splash_attention_mask.LocalMask(square, sides, 0)
    if options.causal:
        return splash_attention_mask.CausalMask(square)
    return splash_attention_mask.FullMask(square)


def _all_samples(options: Options, q, k, v, runs):
    """Return the kernel's output for head-major arrays `[B, N, T, H]`."""
    block = options.block
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    interpret: Any = options.target.interpret or False
    # The tiles that a mask leaves out are found by numpy, while tracing.
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([_mask(options)] * options.heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    if runs is None:
        return jax.vmap(kernel)(q, k, v)
    ids = splash_attention_kernel.SegmentIds(runs, runs)
    return jax.vmap(kernel)(q, k, v, ids)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options, q, k, v, runs):
    return _attention_fwd(options, q, k, v, runs)[0]


# jax's kernel doesn't say over which mesh axes its outputs vary; a checked shard_map
# would refuse it. It mixes no samples, so its outputs vary as its inputs do: the checks
# are off while it is traced, and its results are labelled afterwards.
def _attention_fwd(options, q, k, v, runs):
    attend = lambda q, k, v: _all_samples(options, q, k, v, runs)
    with jax_config._check_vma(False):
        pair: Any = jax.vjp(attend, *map(_unlabelled, (q, k, v)))
    out, pullback = pair
    return vary_like(out, q), (pullback, q[:0])


def _attention_bwd(options, saved, dout):
    pullback, like = saved
    with jax_config._check_vma(False):
        grads = pullback(_unlabelled(dout))
    return *(vary_like(grad, like) for grad in grads), None


def _unlabelled(x: jax.Array) -> jax.Array:
    """Return x as an operation types it while the checks are off: varying nowhere."""
    return jnp.squeeze(jnp.expand_dims(x, 0), 0)


_attention.defvjp(_attention_fwd, _attention_bwd)
