"""Many random operator trees at once, level by level, for ListOps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8

_ABOVE = 99  # more than any digit: sorts behind the arguments


class Level(NamedTuple):
    """The nodes of one depth, those of one parent side by side, in order."""

    tree: Int[np.ndarray, " N"]  # which tree a node belongs to
    is_operator: Bool[np.ndarray, " N"]
    arguments: Int[np.ndarray, " O"]  # of each operator among the nodes


class Trees(NamedTuple):
    """Trees as levels, the roots first."""

    levels: list[Level]
    lengths: Int[np.ndarray, " R"]  # tokens of each tree


def grow_trees(
    rng: np.random.Generator,
    count: int,
    max_depth: int,
    max_args: int,
    operator_share: float,
) -> Trees:
    """Return `count` random trees: a branching process, one draw a level.

    A tree that is a lone digit has a length of 1. The level at `max_depth` has digits
    only.
    """
    tree = np.arange(count)
    lengths = np.zeros(count, np.int64)
    levels = []
    for depth in range(1, max_depth + 1):
        if depth < max_depth:
            is_operator = rng.random(len(tree)) < operator_share
        else:
            is_operator = np.zeros(len(tree), bool)
        operators = tree[is_operator]
        arguments = rng.integers(2, max_args + 1, len(operators))
        levels.append(Level(tree, is_operator, arguments))
        # An operator is two tokens: its name and the closing bracket.
        lengths += np.bincount(tree, minlength=count)
        lengths += np.bincount(operators, minlength=count)
        tree = np.repeat(operators, arguments)
        if not len(tree):
            break
    return Trees(levels, lengths)


def pick_trees(trees: Trees, chosen: Bool[np.ndarray, " R"]) -> Trees:
    """Return the chosen trees, numbered anew."""
    number = np.cumsum(chosen) - 1
    levels = []
    for level in trees.levels:
        here = chosen[level.tree]
        if not here.any():
            break
        kept = here[level.is_operator]
        levels.append(
            Level(
                number[level.tree[here]],
                level.is_operator[here],
                level.arguments[kept],
            )
        )
    return Trees(levels, trees.lengths[chosen])


def write_trees(
    trees: Trees, rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, " N"], Int[np.ndarray, " R1"], Int[np.ndarray, " R"]]:
    """Draw digits and operators; return tokens, where each tree starts, and values.

    Token ids: digit d is 1 + d, operator o (MIN, MAX, MED, SM) is 11 + o, the closing
    bracket is 17.
    """
    starts = np.concatenate([[0], np.cumsum(trees.lengths)]).astype(np.int64)
    tokens = np.zeros(starts[-1], np.uint8)
    sizes, names, values = _fold(trees, rng)
    first = starts[:-1]
    for depth, level in enumerate(trees.levels):
        tokens[first] = names[depth]
        operators = first[level.is_operator]
        tokens[operators + sizes[depth][level.is_operator] - 1] = 17
        if depth + 1 == len(trees.levels):
            break
        inner = sizes[depth + 1]
        before = np.cumsum(inner) - inner
        eldest = np.cumsum(level.arguments) - level.arguments
        shift = operators + 1 - before[eldest]
        first = before + np.repeat(shift, level.arguments)
    return tokens, starts, values.astype(np.int32)


def _fold(
    trees: Trees, rng: np.random.Generator
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Return tokens below and name of every node by level, and the roots' values."""
    sizes: list[np.ndarray] = []
    names: list[np.ndarray] = []
    size = value = np.zeros(0, np.int64)
    for level in reversed(trees.levels):
        own = rng.integers(0, 10, len(level.tree))
        name, own_size = own + 1, np.ones_like(own)
        if len(level.arguments):
            operator = rng.integers(0, 4, len(level.arguments))
            eldest = np.cumsum(level.arguments) - level.arguments
            own[level.is_operator] = _combine(operator, value, level.arguments, eldest)
            name[level.is_operator] = 11 + operator
            own_size[level.is_operator] = 2 + np.add.reduceat(size, eldest)
        size, value = own_size, own
        sizes.append(size)
        names.append(name)
    return sizes[::-1], names[::-1], value


def _combine(
    operator: Int[np.ndarray, " O"],
    value: Int[np.ndarray, " N"],
    arguments: Int[np.ndarray, " O"],
    eldest: Int[np.ndarray, " O"],
) -> Int[np.ndarray, " O"]:
    """Return MIN, MAX, MED or SM (0 to 3) of each operator's arguments."""
    index = eldest[:, None] + np.arange(arguments.max())
    inside = np.arange(arguments.max()) < arguments[:, None]
    rows = np.where(inside, value[np.minimum(index, len(value) - 1)], _ABOVE)
    rows.sort(axis=1)
    row = np.arange(len(rows))
    middle = rows[row, (arguments - 1) // 2] + rows[row, arguments // 2]
    total = np.where(rows == _ABOVE, 0, rows).sum(axis=1)
    results = [rows[:, 0], rows[row, arguments - 1], middle // 2, total % 10]
    return np.stack(results)[operator, row]
