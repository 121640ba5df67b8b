"""Whether the names and seeds that a call asks for pick runs of its blocks."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.e012_evidence.choose import Row
from experiments.e012_evidence.study import listed
from uoe_jax.errors import ConfigError, nearest


def check_picked(
    only: Sequence[str],
    seeds: Sequence[int],
    blocks: Sequence[str],
    rows: Sequence[Row],
) -> None:
    """Raise ConfigError for a name or a seed that picks none of the blocks' runs."""
    runs = set().union(*(listed(block, rows) for block in blocks))
    of, known = f"block {', '.join(blocks)}", {name for name, _ in runs}
    for name in only:
        if name not in known:
            raise ConfigError(
                f"--only {name!r} is no model of {of}; {nearest(name, known)}"
            )
        has = sorted(seed for one, seed in runs if one == name)
        if seeds and not set(seeds) & set(has):
            raise ConfigError(
                f"--seeds {' '.join(map(str, seeds))}: {name!r} of {of} has none of "
                f"these; use some of {has}"
            )
    has = sorted({seed for name, seed in runs if not only or name in only})
    for seed in seeds:
        if seed not in has:
            raise ConfigError(
                f"--seeds {seed}: {of} has no such run; use some of {has}"
            )
