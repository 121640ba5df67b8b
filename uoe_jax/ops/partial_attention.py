"""Attention to a part of the keys, and the sum of several such parts.

Where the keys of a sequence lie on several devices, each brings its part. A part's
result stands with the logsumexp of its scores, which is all that the others need to
know of it (Ring Attention, Liu et al. 2023; FlashAttention-2, arXiv 2307.08691, eq. of
section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from uoe_jax.ops.as_segments import (
    KernelsWithSums,
    Lists,
    masked_softmax,
    merged_attention,
    pack_heads,
    unpack_heads,
)
from uoe_jax.ops.dispatch import dispatch
from uoe_jax.ops.numerics import accumulator_dtype
from uoe_jax.ops.segment_attention.nvidia import mosaic as mosaic_gpu
from uoe_jax.ops.segment_attention.nvidia import triton
from uoe_jax.varying import vary_together

_CHUNK = 512  # queries whose scores exist at once in plain JAX


class Part(NamedTuple):
    """Attention to some of the keys; zeros and `MASKED` where a token sees none."""

    out: Float[Array, "B T N H"]
    lse: Float[Array, "B T N"]

    def plus(self, other: Part) -> Part:
        """Return the attention to the keys of both, in the wider of the dtypes."""
        lse = jnp.logaddexp(self.lse, other.lse)
        mine, theirs = jnp.exp(self.lse - lse), jnp.exp(other.lse - lse)
        return Part(
            self.out * mine[..., None] + other.out * theirs[..., None],
            lse,
        )


@dataclass(frozen=True)
class Call:
    """What is asked for: T queries, L keys elsewhere, and which of these each sees.

    Token t of sample b sees keys `first[b, t]` to `last[b, t]`, both included; ends
    outside of the L are cut, and with `last < first` it sees none.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B L K H"]
    v: Float[Array, "B L K H"]
    first: Int[Array, "B T"]
    last: Int[Array, "B T"]
    scale: float


def partial_attention(call: Call, *, implementation: str | None = None) -> Part:
    """Return each token's attention to the keys that it sees.

    Raises:
      ConfigError: unknown or unfit backend.
    """
    return dispatch("partial_attention", BACKENDS, implementation, call)


def by_lists(kernels: KernelsWithSums, call: Call) -> Part:
    """Return it by a kernel of segment attention: each key head's keys are a list.

    Raises:
      NotImplementedError: as the kernel.
    """
    q, heads = call.q, call.k.shape[2]
    batch, length = q.shape[:2]
    lists = lambda a: pack_heads(a, heads)[:, 0].reshape(batch * heads, -1, a.shape[3])
    ends = (jnp.repeat(a, heads, axis=0).reshape(-1) for a in (call.first, call.last))
    offsets = jnp.arange(batch * heads + 1, dtype=jnp.int32) * length
    rows = Lists(
        pack_heads(q, heads),
        lists(call.k),
        lists(call.v),
        offsets,
        *ends,
        max_rows=length,
        scale=call.scale,
    )
    out, lse = merged_attention(kernels, rows)
    return Part(unpack_heads(out, q), unpack_heads(lse[..., None], q[..., :1])[..., 0])


def in_chunks(call: Call) -> Part:
    """Return it in plain JAX, so many queries at a time that their scores fit.

    Scores are worked out again on the way back rather than kept.
    """
    length = call.q.shape[1]
    run = jax.checkpoint(partial(_written_out, call.k, call.v, call.scale))
    if length <= _CHUNK:
        return run(call.q, call.first, call.last)
    more = -length % _CHUNK

    def chunks(a: Array, fill: int) -> Array:
        a = jnp.pad(a, [(0, 0), (0, more), *[(0, 0)] * (a.ndim - 2)], "constant",
                    constant_values=fill)  # fmt: skip
        return a.reshape(a.shape[0], -1, _CHUNK, *a.shape[2:]).swapaxes(0, 1)

    # Those added see nothing.
    rows = chunks(call.q, 0), chunks(call.first, 0), chunks(call.last, -1)
    found = jax.lax.map(lambda row: run(*row), rows)
    whole = lambda a: a.swapaxes(0, 1).reshape(a.shape[1], -1, *a.shape[3:])
    return Part(*(whole(a)[:, :length] for a in found))


def _written_out(
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K H"],
    scale: float,
    q: Float[Array, "B T N H"],
    first: Int[Array, "B T"],
    last: Int[Array, "B T"],
) -> Part:
    k, v, q, first, last = vary_together(k, v, q, first, last)
    dtype, shape = accumulator_dtype(q.dtype), q.shape
    seen = _seen(first, last, k.shape[1])[:, None, None]
    q = q.reshape(*shape[:2], k.shape[2], -1, shape[3])
    s = jnp.einsum("btkgh,blkh->bkgtl", q, k, preferred_element_type=dtype) * scale
    p, lse = masked_softmax(s, seen)
    p = p.astype(v.dtype)
    out = jnp.einsum("bkgtl,blkh->btkgh", p, v, preferred_element_type=dtype)
    lse = lse.transpose(0, 3, 1, 2).reshape(shape[:3])
    return Part(out.reshape(shape).astype(v.dtype), lse)


def _seen(
    first: Int[Array, "B T"], last: Int[Array, "B T"], keys: int
) -> Bool[Array, "B T L"]:
    place = jnp.arange(keys, dtype=jnp.int32)[None, None]
    return (place >= first[..., None]) & (place <= last[..., None])


# In order of preference; `implementation=None` takes the first that can serve.
BACKENDS = {
    "mosaic_gpu": partial(by_lists, mosaic_gpu.attend),
    "triton": partial(by_lists, triton.attend),
    "xla": in_chunks,
}
