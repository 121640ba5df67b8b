"""The sources of a mixture and their weights, as `data.mix` states them. No jax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from uoe_jax.config import DataConfig
from uoe_jax.errors import ConfigError
from uoe_jax.files import check_path

# Rows in which every source has its exact share; a weight is met to one in so many.
BLOCK = 10_000


class Share(NamedTuple):
    """A source of a mixture and its weight, of which only ratios matter."""

    path: str  # as `data.path`, or "stdlib"
    weight: float


def read_mix(mix: Sequence[str]) -> tuple[Share, ...]:
    """Return the sources that `data.mix` names, each as PATH=WEIGHT.

    Raises ConfigError for a text that isn't that, a weight that isn't positive or too
    small to be met, one source alone and a source named twice.
    """
    shares = []
    for text in mix:
        path, found, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not found or not path.strip() or not 0 < weight < math.inf:
            raise ConfigError(
                f"data.mix has {text!r}; write PATH=WEIGHT with a positive weight, "
                "such as articles.jsonl=0.7"
            )
        shares.append(Share(path.strip(), weight))
    if len(shares) == 1:
        raise ConfigError(
            f"data.mix has one source; set data.path {shares[0].path} instead"
        )
    seen = set[str | Path]()
    for path in (share.path for share in shares):
        # A run's config has absolute paths.
        place = path if path == "stdlib" else Path(path).expanduser().absolute()
        if place in seen:
            raise ConfigError(f"data.mix names {path} twice; add up its weights")
        seen.add(place)
    counts = block_counts([share.weight for share in shares])
    if 0 in counts:
        share = shares[counts.index(0)]
        raise ConfigError(
            f"data.mix gives {share.path} less than one row in {BLOCK:,}; leave it out "
            "or give it a larger weight"
        )
    return tuple(shares)


def check_mix(data: DataConfig) -> None:
    """Raise ConfigError for a mixture that isn't one, or beside another source."""
    if not data.mix:
        return
    for share in read_mix(data.mix):
        check_path(share.path, "a source of data.mix")
    if data.path is not None:
        raise ConfigError(
            f"data.path is {data.path!r} beside data.mix; add it to data.mix as "
            f"{data.path}=WEIGHT, or leave one of them out"
        )
    if data.source != "auto":
        raise ConfigError(
            f"data.source is {data.source!r}, but data.mix takes each source as its "
            "name and content say; leave data.source out"
        )


def block_counts(weights: Sequence[float]) -> list[int]:
    """Return each source's rows of a block: the largest remainders are rounded up."""
    total = math.fsum(weights)
    exact = [weight / total * BLOCK for weight in weights]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for number in by_remainder[: BLOCK - sum(counts)]:
        counts[number] += 1
    return counts
