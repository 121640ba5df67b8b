"""Grouped matmul on NVIDIA GPUs from Ampere on, and the gather or sum around it.

Rows of x are loaded by token id inside the products, so no copy of x by rows is ever
written. A sum over a token's rows is made in a fixed order, in one of two ways: by
writing the products once and adding them up, which moves bytes, or inside one dense
product as deep as all groups together, which multiplies zeros. Both repeat bit by bit.
Where a token has one row there is nothing to add: products are stored at their tokens.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax.ops import nvidia
from uoe_jax.ops.float8 import chosen_scales
from uoe_jax.ops.grouped_matmul.derivative import (
    Products,
    gathered,
    grouped,
    scattered,
)
from uoe_jax.ops.grouped_matmul.float8 import forward_form
from uoe_jax.ops.grouped_matmul.nvidia.float8 import (
    eight_bit_products,
    multiplies_float8,
)
from uoe_jax.ops.grouped_matmul.nvidia.launch import (
    is_permutation,
    products,
    sum_rows,
    weight_grads,
)
from uoe_jax.ops.grouped_matmul.nvidia.tiles import dense_pays
from uoe_jax.ops.packing import Packing, take_rows
from uoe_jax.varying import vary_together


def grouped_matmul(
    x: Float[Array, "M I"], w: Float[Array, "E I O"], offsets: Int[Array, " E1"]
) -> Float[Array, "M O"]:
    """Return each row times its group's weight; rows past the last group are zero.

    Raises:
      NotImplementedError: no fit device, package or dtype, or an empty axis.
    """
    require(x, w)
    x, w, offsets = vary_together(x, w, offsets)
    return grouped(_form(), x, w, offsets.astype(jnp.int32))


def gather_project(
    x: Float[Array, "N I"], w: Float[Array, "E I O"], packing: Packing
) -> Float[Array, "M O"]:
    """Return each row's token times the row's expert weight; keeps only x and w.

    Raises:
      NotImplementedError: as `grouped_matmul`.
    """
    require(x, w, packing.token_ids)
    return gathered(_form(), *packing.together(x, w))


def project_scatter(
    rows: Float[Array, "M I"], w: Float[Array, "E I O"], packing: Packing
) -> Float[Array, "N O"]:
    """Return each token's sum of its rows times their expert weights.

    Raises:
      NotImplementedError: as `grouped_matmul`.
    """
    require(rows, w, packing.row_ids)
    return scattered(_form(), *packing.together(rows, w))


def require(x: jax.Array, w: jax.Array, *ids: jax.Array) -> None:
    """Return if the kernels can serve; raises NotImplementedError."""
    nvidia.require(x.dtype)
    if 0 in (*x.shape, *w.shape, *(side for array in ids for side in array.shape)):
        raise NotImplementedError("it takes no empty arrays")


def two_step_sums(
    rows: Float[Array, "M A"],
    w: Float[Array, "E I O"],
    packing: Packing,
    *,
    transpose: bool,
) -> Float[Array, "N B"]:
    """Return each token's sum of its rows' products, which are written, then added."""
    out = products(rows, w, packing.group_offsets, None, transpose=transpose)
    return sum_rows(out, packing.row_ids)


@functools.partial(jax.jit, static_argnames=("transpose",))
def dense_sums(
    rows: Float[Array, "M A"],
    w: Float[Array, "E I O"],
    packing: Packing,
    *,
    transpose: bool,
) -> Float[Array, "N B"]:
    """Return each token's sum of its rows' products, as one product of all groups.

    A token's rows lie side by side in it, zeros for the groups that it has no row of.
    """
    members = find_members(packing.group_offsets, packing.row_ids, rows.shape[0])
    dense = take_rows(rows, members)
    # In 16 bits cuBLAS adds in float32 and rounds once.
    return jnp.einsum("nei,eoi->no" if transpose else "nei,eio->no", dense, w)


def find_members(
    offsets: Int[Array, " E1"], row_ids: Int[Array, "N X"], num_rows: int
) -> Int[Array, "N E"]:
    """Return each token's row in every group, `num_rows` where it has none."""
    ids, edges = row_ids[:, :, None], offsets[None, None]
    inside = (ids >= edges[..., :-1]) & (ids < edges[..., 1:])
    return jnp.min(jnp.where(inside, ids, num_rows), axis=1)


def _project_sum(rows, w, packing, transpose):
    """Return each token's sum of its rows times their weights, the fastest way."""
    if is_permutation(packing):
        # Rows of dropped picks are there too, past the last group: they are zero.
        offsets, ids = packing.group_offsets, packing.token_ids
        return products(rows, w, offsets, ids, transpose=transpose, scatter=True)
    groups, *sides = w.shape
    inner, outer = reversed(sides) if transpose else sides
    sizes = rows.shape[0], packing.row_ids.shape[0], groups, inner, outer
    run = dense_sums if dense_pays(*sizes, rows.dtype) else two_step_sums
    return run(rows, w, packing, transpose=transpose)


def _sums(rows, w, packing, *, transpose):
    out = _project_sum(rows, w, packing, transpose)
    # Forward, XLA adds the residual inside a dense product, for which it copies it
    # first; behind the barrier the next norm adds it while it reads.
    return out if transpose else jax.lax.optimization_barrier(out)


TRITON = Products(products, _sums, weight_grads)


def _form() -> Products:
    """Return the products, with operands of eight bits where they are asked for."""
    scales = chosen_scales()
    if scales == "none" or not multiplies_float8():
        return forward_form(TRITON)
    return eight_bit_products(TRITON, scales)
