"""The three forms of grouped matmul and their gradients, made of a backend's products.

For rows m of group e, with y = x w the gradients are dx = dy w^T and, of each group,
dw = x^T dy over its rows. The gather before a product and the sum after it are each
other's transpose, so the gradient of one form is the other with weights transposed.
Only the arrays of the call are kept for it: no copy of tokens by rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jaxtyping import Array, Float, Int

from uoe_jax.ops.packing import Packing


@dataclass(frozen=True)
class Products:
    """What a backend computes. Equal ones are one to a program's cache.

    - `products(x, w, offsets, ids, *, transpose)`: each row of x, or of x[ids], times
      its group's weight or the transpose of it; rows past the last group are zero.
    - `sums(rows, w, packing, *, transpose)`: each token's sum of its rows' products.
    - `weight_grads(x, grad, offsets, x_ids, grad_ids)`: every group's sum of x (outer)
      grad over its rows, of either by ids where they are given.
    """

    products: Callable[..., jax.Array]
    sums: Callable[..., jax.Array]
    weight_grads: Callable[..., jax.Array]


def _grouped(
    backend: Products,
    x: Float[Array, "M I"],
    w: Float[Array, "E I O"],
    offsets: Int[Array, " E1"],
) -> Float[Array, "M O"]:
    """Return each row times its group's weight."""
    return backend.products(x, w, offsets, None, transpose=False)


def _grouped_fwd(backend, x, w, offsets):
    return grouped(backend, x, w, offsets), (x, w, offsets)


def _grouped_bwd(backend, saved, grad):
    x, w, offsets = saved
    dx = backend.products(grad, w, offsets, None, transpose=True)
    dw = backend.weight_grads(x, grad, offsets, None, None)
    return dx, dw.astype(w.dtype), None


def _gather_project(
    backend: Products,
    x: Float[Array, "N I"],
    w: Float[Array, "E I O"],
    packing: Packing,
) -> Float[Array, "M O"]:
    """Return each row's token times the row's expert weight."""
    offsets, ids = packing.group_offsets, packing.token_ids
    return backend.products(x, w, offsets, ids, transpose=False)


def _gather_project_fwd(backend, x, w, packing):
    return gathered(backend, x, w, packing), (x, w, packing)


def _gather_project_bwd(backend, saved, grad):
    x, w, packing = saved
    offsets, ids = packing.group_offsets, packing.token_ids
    dw = backend.weight_grads(x, grad, offsets, ids, None)
    dx = backend.sums(grad, w, packing, transpose=True)
    return dx, dw.astype(w.dtype), None


def _project_scatter(
    backend: Products,
    rows: Float[Array, "M I"],
    w: Float[Array, "E I O"],
    packing: Packing,
) -> Float[Array, "N O"]:
    """Return each token's sum of its rows times their expert weights."""
    return backend.sums(rows, w, packing, transpose=False)


def _project_scatter_fwd(backend, rows, w, packing):
    return scattered(backend, rows, w, packing), (rows, w, packing)


def _project_scatter_bwd(backend, saved, grad):
    rows, w, packing = saved
    offsets, ids = packing.group_offsets, packing.token_ids
    drows = backend.products(grad, w, offsets, ids, transpose=True)
    dw = backend.weight_grads(rows, grad, offsets, None, ids)
    return drows, dw.astype(w.dtype), None


# Named by their functions in programs: adapters know them by these names.
_form = functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
grouped, gathered = _form(_grouped), _form(_gather_project)
scattered = _form(_project_scatter)
grouped.defvjp(_grouped_fwd, _grouped_bwd)
gathered.defvjp(_gather_project_fwd, _gather_project_bwd)
scattered.defvjp(_project_scatter_fwd, _project_scatter_bwd)
