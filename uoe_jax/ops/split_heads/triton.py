"""Splitting and rotating heads in one pass over the rows, on NVIDIA GPUs.

XLA makes a copy of each part, with sines of every row. Here rows are read once and
written once, each way, and a token's sines are made once for all its rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from uoe_jax.ops import nvidia
from uoe_jax.ops.rotary import cosines_and_sines

ROWS = 32  # of a program


def split_heads(
    rows: Float[Array, "M O"],
    positions: Int[Array, " N"],
    token_ids: Int[Array, " M"],
    *,
    kv_heads: int,
    groups: int,
    theta: float | None,
) -> tuple[Array, Array, Array]:
    """Return queries [J, M, G, H], keys and values [J, M, H] of packed rows.

    Raises:
      NotImplementedError: no fit device, package or dtype, no rotation, an empty axis,
        or a head width that isn't a power of two from 16 on.
    """
    nvidia.require(rows.dtype)
    if theta is None:
        raise NotImplementedError("it only splits what it rotates")
    if 0 in (*rows.shape, *positions.shape):
        raise NotImplementedError("it takes no empty arrays")
    width = rows.shape[1] // (kv_heads * (groups + 2))
    if width < 16 or width & (width - 1):
        raise NotImplementedError(
            f"it takes head widths that are powers of two from 16 on, not {width}"
        )
    ids = token_ids.astype(jnp.int32)
    return _split(rows, positions, ids, kv_heads, groups, theta)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _split(rows, positions, token_ids, kv_heads, groups, theta):
    table = _table(positions, rows.shape[1] // (kv_heads * (groups + 2)), theta)
    return split(rows, table, token_ids, kv_heads, groups)


def _split_fwd(rows, positions, token_ids, kv_heads, groups, theta):
    parts = _split(rows, positions, token_ids, kv_heads, groups, theta)
    return parts, (positions, token_ids)


def _split_bwd(kv_heads, groups, theta, saved, grads):
    positions, token_ids = saved
    table = _table(positions, grads[1].shape[-1], theta)
    return join(*grads, table, token_ids), None, None


_split.defvjp(_split_fwd, _split_bwd)


def _table(positions, width, theta):
    """Return each token's cosines, then its sines."""
    return jnp.concatenate(cosines_and_sines(positions, width, theta), axis=-1)


@functools.partial(jax.jit, static_argnums=(3, 4))
def split(
    rows: Float[Array, "M O"],
    table: Float32[Array, "N H"],
    token_ids: Int[Array, " M"],
    kv_heads: int,
    groups: int,
) -> tuple[Array, Array, Array]:
    """Return the rotated heads of rows."""
    from uoe_jax.ops.split_heads import triton_kernels

    count, width = rows.shape[0], table.shape[1]
    keys = (kv_heads, count, width)
    queries = (kv_heads, count, groups, width)
    return tuple(
        nvidia.launch(
            triton_kernels.split_heads,
            rows,
            table,
            token_ids,
            out_shape=[(side, rows.dtype) for side in (queries, keys, keys)],
            **_constants(count, kv_heads, groups, width),
        )
    )


@jax.jit
def join(
    q: Float[Array, "J M G H"],
    k: Float[Array, "J M H"],
    v: Float[Array, "J M H"],
    table: Float32[Array, "N H"],
    token_ids: Int[Array, " M"],
) -> Float[Array, "M O"]:
    """Return the rows of heads, rotated back."""
    from uoe_jax.ops.split_heads import triton_kernels

    kv_heads, count, groups, width = q.shape
    return nvidia.launch(
        triton_kernels.join_heads,
        q,
        k,
        v,
        table,
        token_ids,
        out_shape=((count, kv_heads * (groups + 2) * width), q.dtype),
        **_constants(count, kv_heads, groups, width),
    )


def _constants(count, kv_heads, groups, width):
    return {
        "grid": -(-count // ROWS),
        "num_warps": 4,
        "num_stages": 1,
        "M": count,
        "J": kv_heads,
        "G": groups,
        "H": width,
        "ROWS": ROWS,
    }
