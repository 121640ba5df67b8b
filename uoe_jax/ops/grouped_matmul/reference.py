"""One matrix product per group of rows, written out: the oracle. E-fold work."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax.ops.float8 import chosen_scales
from uoe_jax.ops.numerics import accumulator_dtype
from uoe_jax.ops.packing import Packing


def grouped_matmul(
    x: Float[Array, "M I"], w: Float[Array, "E I O"], offsets: Int[Array, " E1"]
) -> Float[Array, "M O"]:
    """Return each row times its group's weight; rows past the last group are zero.

    Raises:
      NotImplementedError: operands of eight bits are asked for.
    """
    if chosen_scales() != "none":
        raise NotImplementedError("its operands aren't rounded to eight bits")
    dtype = accumulator_dtype(x.dtype)
    row = jnp.arange(x.shape[0])[None]
    member = (row >= offsets[:-1, None]) & (row < offsets[1:, None])
    rows = jnp.where(member[:, :, None], x[None], 0).astype(dtype)
    out = jnp.einsum(
        "emi,eio->mo", rows, w.astype(dtype), precision=jax.lax.Precision.HIGHEST
    )
    return out.astype(x.dtype)


def gather_project(
    x: Float[Array, "N I"], w: Float[Array, "E I O"], packing: Packing
) -> Float[Array, "M O"]:
    """Return each row's token times the row's expert weight."""
    return grouped_matmul(x[packing.token_ids], w, packing.group_offsets)


def project_scatter(
    rows: Float[Array, "M I"], w: Float[Array, "E I O"], packing: Packing
) -> Float[Array, "N O"]:
    """Return each token's sum of its rows times their expert weights."""
    dtype = accumulator_dtype(rows.dtype)
    out = grouped_matmul(rows.astype(dtype), w.astype(dtype), packing.group_offsets)
    return out[packing.row_ids].sum(axis=1).astype(rows.dtype)
