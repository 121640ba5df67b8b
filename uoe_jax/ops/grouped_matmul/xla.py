"""Grouped matmul in plain JAX: any device, the work of one product per row."""

from __future__ import annotations

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax.ops.grouped_matmul import batched, serial
from uoe_jax.ops.grouped_matmul.derivative import (
    Products,
    gathered,
    grouped,
    scattered,
)
from uoe_jax.ops.grouped_matmul.float8 import forward_form
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
    return grouped(_products(blocks), *vary_together(x, w, offsets))


def gather_project(
    x: Float[Array, "N I"],
    w: Float[Array, "E I O"],
    packing: Packing,
    *,
    blocks: ModuleType | None = None,
) -> Float[Array, "M O"]:
    """Return each row's token times the row's expert weight; keeps only x and w."""
    return gathered(_products(blocks), *packing.together(x, w))


def project_scatter(
    rows: Float[Array, "M I"],
    w: Float[Array, "E I O"],
    packing: Packing,
    *,
    blocks: ModuleType | None = None,
) -> Float[Array, "N O"]:
    """Return each token's sum of its rows times their expert weights."""
    return scattered(_products(blocks), *packing.together(rows, w))


def _products(blocks: ModuleType | None) -> Products:
    return forward_form(_backend(_choose(blocks)))


def _choose(blocks: ModuleType | None) -> ModuleType:
    if blocks is not None:
        return blocks
    return serial if jax.default_backend() == "cpu" else batched


@functools.cache
def _backend(blocks: ModuleType) -> Products:
    def sums(rows, w, packing, *, transpose):
        offsets = packing.group_offsets
        out = blocks.products(rows, w, offsets, None, transpose=transpose)
        return combine_rows(out, packing)

    return Products(blocks.products, sums, blocks.weight_grads)
