"""Which example comes when: a seeded permutation computed by index."""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Int, UInt64

_ROUNDS = 6


def permute(
    index: Int[np.ndarray, " N"], size: int, key: tuple[int, ...]
) -> Int[np.ndarray, " N"]:
    """Return where a keyed permutation of range(size) sends each index.

    A Feistel network over the next even power of two, walked until it lands inside
    (Black and Rogaway 2002): no table, so a billion examples cost no memory and any
    place is found at once.
    """
    half = np.uint64(max((size - 1).bit_length() + 1, 2) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    digest = hashlib.sha512(repr((size, key)).encode()).digest()
    round_keys = np.frombuffer(digest, "<u8")[:_ROUNDS].astype(np.uint64)
    result = index.astype(np.uint64)
    outside = np.ones(len(result), bool)
    while outside.any():
        value = result[outside]
        left, right = value >> half, value & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        result[outside] = (left << half) | right
        outside = result >= np.uint64(size)
    return result.astype(np.int64)


def _mix(value: UInt64[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
    """Return a well-spread hash of each value (the finaliser of splitmix64)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def train_order(
    positions: Int[np.ndarray, " N"], size: int, seed: int
) -> Int[np.ndarray, " N"]:
    """Return the examples at positions of an endless run of reshuffled epochs."""
    result = np.empty(len(positions), np.int64)
    epochs = positions // size
    for epoch in np.unique(epochs):
        here = epochs == epoch
        result[here] = permute(positions[here] % size, size, (seed, int(epoch)))
    return result


def eval_order(positions: Int[np.ndarray, " N"], size: int) -> Int[np.ndarray, " N"]:
    """Return the examples at positions of one fixed pass; -1 past its end.

    The order is shuffled, the same for every seed: so the first few batches are a fair
    sample of the split and not its first document.
    """
    result = np.full(len(positions), -1, np.int64)
    inside = positions < size
    result[inside] = permute(positions[inside], size, ())
    return result
