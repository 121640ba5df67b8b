"""Grouped matmul in plain JAX: any device, the work of one product per row."""

from __future__ import annotations

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax.ops.grouped_matmul import batched, serial
from uoe_jax.ops.packing import Packing, combine_rows
from uoe_jax.varying import vary_together


def grouped_matmul(
    x: Float[Array, "M I"],
    w: Float[Array, "E I O"],
    offsets: Int[Array, " E1"],
    *,
    blocks: ModuleType | None = None,
) -> Float[Array, "M O"]:
    """Return each row times its group's weight; rows past the last group are zero.

    `blocks` is `serial` or `batched`; None: by device.
    """
    if x.shape[0] == 0:
        return jnp.zeros((0, w.shape[2]), x.dtype)
    return _grouped(_choose(blocks), *vary_together(x, w, offsets))


def gather_project(
    x: Float[Array, "N I"],
    w: Float[Array, "E I O"],
    packing: Packing,
    *,
    blocks: ModuleType | None = None,
) -> Float[Array, "M O"]:
    """Return each row's token times the row's expert weight; keeps only x and w."""
    return _gather_project(_choose(blocks), *packing.together(x, w))


def project_scatter(
    rows: Float[Array, "M I"],
    w: Float[Array, "E I O"],
    packing: Packing,
    *,
    blocks: ModuleType | None = None,
) -> Float[Array, "N O"]:
    """Return each token's sum of its rows times their expert weights."""
    return _project_scatter(_choose(blocks), *packing.together(rows, w))


def _choose(blocks: ModuleType | None) -> ModuleType:
    if blocks is not None:
        return blocks
    return serial if jax.default_backend() == "cpu" else batched


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(blocks, x, w, offsets):
    return blocks.products(x, w, offsets, None, transpose=False)


def _grouped_fwd(blocks, x, w, offsets):
    return _grouped(blocks, x, w, offsets), (x, w, offsets)


def _grouped_bwd(blocks, saved, grad):
    x, w, offsets = saved
    dx = blocks.products(grad, w, offsets, None, transpose=True)
    dw = blocks.weight_grads(x, grad, offsets, None, None)
    return dx, dw.astype(w.dtype), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_project(blocks, x, w, packing):
    offsets, ids = packing.group_offsets, packing.token_ids
    return blocks.products(x, w, offsets, ids, transpose=False)


def _gather_project_fwd(blocks, x, w, packing):
    return _gather_project(blocks, x, w, packing), (x, w, packing)


def _gather_project_bwd(blocks, saved, grad):
    x, w, packing = saved
    offsets, ids = packing.group_offsets, packing.token_ids
    rows = blocks.products(grad, w, offsets, None, transpose=True)
    dw = blocks.weight_grads(x, grad, offsets, ids, None)
    return combine_rows(rows, packing), dw.astype(w.dtype), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project_scatter(blocks, rows, w, packing):
    out = blocks.products(rows, w, packing.group_offsets, None, transpose=False)
    return combine_rows(out, packing)


def _project_scatter_fwd(blocks, rows, w, packing):
    return _project_scatter(blocks, rows, w, packing), (rows, w, packing)


def _project_scatter_bwd(blocks, saved, grad):
    rows, w, packing = saved
    offsets, ids = packing.group_offsets, packing.token_ids
    drows = blocks.products(grad, w, offsets, ids, transpose=True)
    dw = blocks.weight_grads(rows, grad, offsets, None, ids)
    return drows, dw.astype(w.dtype), None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)
_gather_project.defvjp(_gather_project_fwd, _gather_project_bwd)
_project_scatter.defvjp(_project_scatter_fwd, _project_scatter_bwd)
