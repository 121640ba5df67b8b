"""Widths of the degree buckets: how much padding, for how many compilations."""

from __future__ import annotations

from typing import Any

import numpy as np

MAX_BUCKETS = 6


def round_up(size: Any) -> Any:
    """Return sizes at most 1/16 larger, and few different ones.

    Similar problems (the folds of a cross-validation) then share compiled code.
    """
    bits = np.frexp(np.asarray(size, np.float64))[1]
    grain = 2 ** np.maximum(bits - 5, 0)
    return -(-size // grain) * grain


def choose_widths(
    degree: np.ndarray, max_buckets: int = MAX_BUCKETS, worth: float = 0.0
) -> list[int]:
    """Return the bucket widths with least padding, by dynamic programming.

    Of fewer than `max_buckets`, the first number that one more bucket would not lower
    by the fraction `worth`.
    """
    degree = degree[degree > 0]
    if not degree.size:
        return []
    rounded = round_up(-(-degree // 4) * 4)
    candidates, counts = np.unique(rounded, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    num = len(candidates)
    cost = np.full((max_buckets + 1, num + 1), np.inf)
    cost[:, 0] = 0.0
    previous = np.zeros((max_buckets + 1, num + 1), int)
    for used in range(1, max_buckets + 1):
        for end in range(1, num + 1):
            area = (below[end] - below[:end]) * float(candidates[end - 1])
            total = cost[used - 1, :end] + area
            previous[used, end] = int(np.argmin(total))
            cost[used, end] = total.min()
    saved = 1 - cost[2:, num] / cost[1:-1, num]
    first = 1 + int(np.argmax(np.append(saved <= worth, True)))
    widths, end = [], num
    for used in range(first, 0, -1):
        if end == 0:
            break
        widths.append(int(candidates[end - 1]))
        end = int(previous[used, end])
    return sorted(widths)
