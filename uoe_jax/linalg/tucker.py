"""Tucker decompositions: a core tensor and one factor for each mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from uoe_jax.errors import ConfigError
from uoe_jax.linalg.lowrank import HIGHEST


class Tucker(NamedTuple):
    """`core` [r_1, ..., r_N] and `factors[i]` [d_i, r_i]."""

    core: Array
    factors: tuple[Array, ...]


def unfold(tensor: Float[Array, "*shape"], mode: int) -> Float[Array, "M N"]:
    """Return the mode-`mode` unfolding: that axis as rows, all others as columns."""
    return jnp.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)


def mode_product(
    tensor: Float[Array, "*shape"], matrix: Float[Array, "P Q"], mode: int
) -> Float[Array, "*other"]:
    """Return `tensor x_mode matrix` (Kolda and Bader 2009, section 2.5): Q -> P."""
    moved = jnp.tensordot(matrix, tensor, axes=(1, mode), precision=HIGHEST)
    return jnp.moveaxis(moved, 0, mode)


def tucker_to_tensor(parts: Tucker) -> Float[Array, "*other"]:
    """Return the tensor that a core and its factors stand for."""
    tensor = parts.core
    for mode, factor in enumerate(parts.factors):
        tensor = mode_product(tensor, factor, mode)
    return tensor


def clamp_ranks(shape: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Return ranks no larger than a tensor of this shape can have in each mode.

    That is the mode's size, and the product of the other modes' sizes. Raises
    ConfigError for a rank below 1 or a wrong number of ranks.
    """
    if len(ranks) != len(shape):
        raise ConfigError(
            f"{len(ranks)} ranks for a tensor of shape {list(shape)}; "
            f"give {len(shape)}, one for each mode"
        )
    if min(ranks) < 1:
        raise ConfigError(f"Tucker ranks are {list(ranks)}; each must be at least 1")
    size = math.prod(shape)
    return tuple(
        min(rank, width, size // width)
        for rank, width in zip(ranks, shape, strict=True)
    )


def hosvd(tensor: Float[Array, "*shape"], ranks: Sequence[int]) -> Tucker:
    """Return the truncated higher-order SVD (De Lathauwer et al. 2000).

    Factors are the leading left singular vectors of the unfoldings, so orthonormal; the
    squared error is at most the sum over modes of the discarded energies, hence at most
    N times the best. Ranks are clamped by `clamp_ranks`.
    """
    ranks = clamp_ranks(tensor.shape, ranks)
    factors = tuple(
        _leading_vectors(unfold(tensor, mode), rank) for mode, rank in enumerate(ranks)
    )
    return Tucker(_project(tensor, factors), factors)


def hooi(
    tensor: Float[Array, "*shape"], ranks: Sequence[int], *, sweeps: int = 5
) -> Tucker:
    """Return HOSVD refined by higher-order orthogonal iteration; never worse.

    De Lathauwer et al. 2000b, algorithm 4.2: each factor in turn is the best one for
    the others as they are.
    """
    factors = list(hosvd(tensor, ranks).factors)
    for _ in range(sweeps):
        for mode, factor in enumerate(factors):
            rest = tensor
            for other, basis in enumerate(factors):
                if other != mode:
                    rest = mode_product(rest, basis.T, other)
            factors[mode] = _leading_vectors(unfold(rest, mode), factor.shape[1])
    return Tucker(_project(tensor, tuple(factors)), tuple(factors))


def count_tucker(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """Return how many numbers a core and its factors have."""
    sizes = (d * r for d, r in zip(shape, ranks, strict=True))
    return math.prod(ranks) + sum(sizes)


def _project(tensor: Array, factors: tuple[Array, ...]) -> Array:
    core = tensor
    for mode, factor in enumerate(factors):
        core = mode_product(core, factor.T, mode)
    return core


def _leading_vectors(matrix: Array, rank: int) -> Array:
    # Rows are few beside the columns: the small Gram matrix would lose half the
    # digits, so the matrix itself is decomposed.
    return jnp.linalg.svd(matrix, full_matrices=False)[0][:, :rank]
