"""Pairs of query and key dimensions by how much they add to attention's scores.

A score is the product of a query and a key, a sum over rotary pairs. MoDeGPT (Lin et
al. 2024, algorithm 2) keeps the pairs with the largest product of norms, one set for a
key head and the query heads that share it. Rotation leaves a pair's norm as it is, so
sums of squares are all that is needed. The scale of the scores stays that of the whole
head.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def fold_pairs(
    squares: Float[np.ndarray, "*N H"], rotates: bool
) -> Float[np.ndarray, "*N P"]:
    """Return sums of squares by pair (i, i + H/2); by dimension if nothing rotates."""
    squares = squares.astype(np.float64)
    if not rotates:
        return squares
    half = squares.shape[-1] // 2
    return squares[..., :half] + squares[..., half:]


def pair_scores(
    query_squares: Float[np.ndarray, "J G H"],
    key_squares: Float[np.ndarray, "J H"],
    rotates: bool,
) -> Float[np.ndarray, "J P"]:
    """Return each pair's score: root of (its query heads' energy times its keys')."""
    queries = fold_pairs(query_squares, rotates).sum(axis=1)
    return np.sqrt(queries * fold_pairs(key_squares, rotates))


def kept_pairs(scores: Float[np.ndarray, "J P"], count: int) -> Int[np.ndarray, "J K"]:
    """Return the `count` best pairs of each key head, ascending."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return np.sort(order, axis=1)


def pair_dims(
    pairs: Int[np.ndarray, "J K"], head_dim: int, rotates: bool
) -> Int[np.ndarray, "J KD"]:
    """Return the dimensions of pairs: first all first halves, then all second ones."""
    if not rotates:
        return pairs
    return np.concatenate([pairs, pairs + head_dim // 2], axis=1)
