"""ListOps: nested list operations on digits, evaluated and generated.

Nangia and Bowman 2018; lengths and operators of the Long Range Arena (Tay et al. 2020).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from uoe_jax.data.tasks.trees import Trees, grow_trees, pick_trees, write_trees
from uoe_jax.errors import DataError

DIGITS = tuple("0123456789")
END = "]"
# The order of the operators is their number in `trees.combine`; the generator draws
# from the first four, as the Long Range Arena does.
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM", "[FIRST", "[LAST")
WORDS = ("<pad>", *DIGITS, *OPERATORS, END)

_TREES = 1 << 14  # roots grown at once; part of what a seed means
_DRY_CHUNKS = 50  # without a new expression: there are no more


class ListOpsRules(NamedTuple):
    """What expressions are drawn; the defaults are the Long Range Arena's.

    Lengths are in tokens, both limits excluded. A node is an operator with probability
    `operator_share` (never at `max_depth`) and then has 2 to `max_args` arguments.
    """

    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10
    max_args: int = 10
    operator_share: float = 0.25


PUBLISHED = ListOpsRules()


class Expressions(NamedTuple):
    """Expressions end to end: number n is tokens[starts[n]:starts[n + 1]]."""

    tokens: UInt8[np.ndarray, " N"]  # ids into WORDS
    starts: Int[np.ndarray, " E1"]
    labels: Int[np.ndarray, " E"]


def evaluate(tokens: str | Iterable[str]) -> int:
    """Return the value 0 to 9 of an expression; parentheses are passed over.

    The median of an even number of values is the lower half of the two in the middle,
    (a + b) // 2. Raises DataError if the tokens aren't one whole expression.
    """
    words = tokens.split() if isinstance(tokens, str) else list(tokens)
    open_lists: list[tuple[str, list[int]]] = [("", [])]
    for place, word in enumerate(words):
        if word in DIGITS:
            open_lists[-1][1].append(int(word))
        elif word in OPERATORS:
            open_lists.append((word, []))
        elif word == END and len(open_lists) > 1 and open_lists[-1][1]:
            operator, values = open_lists.pop()
            open_lists[-1][1].append(_APPLY[operator](values))
        elif word not in ("(", ")"):
            raise DataError(
                f"ListOps token {place} is {word!r}; an expression has digits and "
                f"{' '.join(OPERATORS)} with at least one value before each {END}"
            )
    if len(open_lists) > 1 or len(open_lists[0][1]) != 1:
        raise DataError(
            f"ListOps tokens hold {len(open_lists[0][1])} whole expressions and "
            f"{len(open_lists) - 1} open ones; give one that is closed"
        )
    return open_lists[0][1][0]


def _median(values: list[int]) -> int:
    ordered = sorted(values)
    count = len(ordered)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) // 2


_APPLY: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": _median,
    "[SM": lambda values: sum(values) % 10,
    "[FIRST": lambda values: values[0],
    "[LAST": lambda values: values[-1],
}


def to_words(ids: Iterable[int] | np.ndarray) -> list[str]:
    """Return the tokens of ids."""
    return [WORDS[i] for i in ids]


def generate(
    count: int,
    seed: int,
    rules: ListOpsRules = PUBLISHED,
    advance: Callable[[int], None] = lambda count: None,
) -> Expressions:
    """Return `count` different expressions of a seed.

    The first expressions of a seed are the same for every count. Raises DataError if
    the rules allow fewer.
    """
    seen: set[bytes] = set()
    tokens: list[np.ndarray] = []
    labels: list[int] = []
    chunk = dry = 0
    while len(labels) < count:
        rows = _generate_chunk(np.random.default_rng([seed, chunk]), rules)
        before = len(labels)
        for row, label in zip(
            np.split(rows.tokens, rows.starts[1:-1]), rows.labels, strict=True
        ):
            digest = hashlib.blake2b(row.tobytes(), digest_size=16).digest()
            if digest not in seen and len(labels) < count:
                seen.add(digest)
                tokens.append(row)
                labels.append(int(label))
        chunk, dry = chunk + 1, 0 if len(labels) > before else dry + 1
        advance(len(labels) - before)
        if dry == _DRY_CHUNKS:
            raise DataError(
                f"ListOps has {len(labels)} expressions longer than "
                f"{rules.min_length} and shorter than {rules.max_length} tokens, not "
                f"{count}; ask for fewer or widen data.min_length, data.max_length"
            )
    lengths = [len(row) for row in tokens]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Expressions(np.concatenate(tokens), starts, np.array(labels, np.int32))


def _generate_chunk(rng: np.random.Generator, rules: ListOpsRules) -> Expressions:
    """Return the expressions of fitting length among a chunk of random trees."""
    trees: Trees = grow_trees(
        rng, _TREES, rules.max_depth, rules.max_args, rules.operator_share
    )
    lengths = trees.lengths
    fits = (lengths > rules.min_length) & (lengths < rules.max_length)
    kept = pick_trees(trees, fits)
    return Expressions(*write_trees(kept, rng))
