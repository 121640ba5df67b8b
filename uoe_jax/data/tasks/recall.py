"""Associative recall and copying: can a model fetch what it saw far back?

Recall is the multi-query task of Arora et al. 2023 (Zoology, arXiv 2312.04927, section
3.2): keys with their values, then each key once more at some distance, where its value
is the token to predict. Here the value stands behind its key there as well, and what
fills the rest is of an alphabet of its own, so that each key has one value.
Copying: a random string, an end, the string again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer, UInt8

from uoe_jax.errors import ConfigError

FILLER = (0, 64)  # ids from, and to before
KEYS = (64, 160)
VALUES = (160, 256)
MOST_PAIRS = KEYS[1] - KEYS[0]
STRING = (1, 256)  # ids of strings that are copied
END = 0  # of a string
_POWER = 0.01  # of Zoology's law of distances: nearly as often in each doubling
_CHUNK = 1 << 11  # examples drawn at once; part of what a seed means


class Examples(NamedTuple):
    """Rows of token ids, and which tokens are to be predicted."""

    tokens: UInt8[np.ndarray, "N T"]
    scored: UInt8[np.ndarray, "N T"]


def check_recall(length: int, pairs: int) -> None:
    """Raise ConfigError for pairs that an example of so many tokens can't hold."""
    if pairs > MOST_PAIRS:
        raise ConfigError(
            f"data.pairs is {pairs}; there are {MOST_PAIRS} keys, use at most as many"
        )
    if length < 4 * pairs:
        raise ConfigError(
            f"data.seq_len is {length}, but {pairs} keys with their values and again "
            f"are {4 * pairs} tokens; use data.pairs {max(length // 4, 1)} or fewer"
        )


def check_copying(length: int) -> None:
    """Raise ConfigError for examples that are too short for a string said twice."""
    if length < 8:
        raise ConfigError(
            f"data.seq_len is {length}; copying needs at least 8 tokens, a string and "
            "the string again"
        )


def generate_recall(count: int, seed: int, length: int, pairs: int) -> Examples:
    """Return `count` examples; the first of a seed are the same for every count."""
    check_recall(length, pairs)
    made = lambda rng: _recall(rng, length, pairs)
    return _in_chunks(count, seed, made)


def generate_copying(count: int, seed: int, length: int) -> Examples:
    """Return `count` examples; the first of a seed are the same for every count."""
    check_copying(length)
    made = lambda rng: _copying(rng, length)
    return _in_chunks(count, seed, made)


def _in_chunks(
    count: int, seed: int, make: Callable[[np.random.Generator], Examples]
) -> Examples:
    def chunks() -> Iterator[Examples]:
        for number in range(-(-count // _CHUNK)):
            yield make(np.random.default_rng([seed, number]))

    tokens, scored = zip(*chunks(), strict=True)
    return Examples(np.concatenate(tokens)[:count], np.concatenate(scored)[:count])


def _recall(rng: np.random.Generator, length: int, pairs: int) -> Examples:
    tokens = rng.integers(*FILLER, (_CHUNK, length), dtype=np.uint8)
    scored = np.zeros_like(tokens)
    keys = np.argsort(rng.random((_CHUNK, MOST_PAIRS)), axis=1)[:, :pairs] + KEYS[0]
    values = rng.integers(*VALUES, (_CHUNK, pairs))
    tokens[:, 0 : 2 * pairs : 2] = keys
    tokens[:, 1 : 2 * pairs : 2] = values
    slots = (length - 2 * pairs) // 2
    weights = np.log(np.arange(1, slots + 1)) * (_POWER - 1)
    # The keys come in random order, so it doesn't matter which slot is drawn first.
    places = 2 * pairs + 2 * _draw_some(rng, weights, pairs)
    rows = np.arange(_CHUNK)[:, None]
    tokens[rows, places], tokens[rows, places + 1] = keys, values
    scored[rows, places + 1] = 1
    return Examples(tokens, scored)


def _draw_some(
    rng: np.random.Generator, weights: Float[np.ndarray, " S"], count: int
) -> Int[np.ndarray, "N K"]:
    """Return slots drawn without replacement by log weights, in random order.

    The highest of weights with Gumbel noise are such a draw (Vieira 2014).
    """
    noisy = weights + rng.gumbel(size=(_CHUNK, len(weights)))
    drawn = np.argpartition(-noisy, count - 1, axis=1)[:, :count]
    return rng.permuted(drawn, axis=1)


def _copying(rng: np.random.Generator, length: int) -> Examples:
    longest = (length - 1) // 2
    sizes = rng.integers(max(longest // 4, 1), longest + 1, (_CHUNK, 1))
    strings = rng.integers(*STRING, (_CHUNK, length), dtype=np.uint8)
    place = np.arange(length)[None]
    again = place - sizes - 1  # where in its string a token of the second one is
    inside = (again >= 0) & (again < sizes)
    copied = np.take_along_axis(strings, np.clip(again, 0, length - 1), axis=1)
    tokens = np.where(place < sizes, strings, np.where(inside, copied, END))
    return Examples(tokens.astype(np.uint8), inside.astype(np.uint8))


def recall_distances(
    tokens: Integer[np.ndarray, "N T"], scored: Integer[np.ndarray, "N T"]
) -> Int[np.ndarray, "N T"]:
    """Return how many tokens back the value of each scored one stands; 0: not scored.

    The value was behind its key's first place: as far back as that key is.
    """
    distances = np.zeros(tokens.shape, np.int64)
    for row, place in zip(*np.nonzero(scored), strict=True):
        key = tokens[row, place - 1]
        first = int(np.argmax(tokens[row] == key))
        distances[row, place] = place - 1 - first
    return distances
