"""Generated tasks as sources: the same examples for every seed of a run."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from uoe_jax.config import DataConfig
from uoe_jax.data.arrays import ArraySource, Pairs, Ragged
from uoe_jax.data.progress import note
from uoe_jax.data.tasks import listops, pathfinder, recall
from uoe_jax.errors import ConfigError

_SEED = 0
_WORTH_A_NOTE = 20_000  # examples


class Sizes(NamedTuple):
    """Examples of a task's splits."""

    train: int
    held_out: int  # of valid and of test


# The Long Range Arena's sizes (Tay et al. 2020), and Zoology's.
TASKS = {
    "listops": Sizes(96_000, 2000),
    "pathfinder": Sizes(160_000, 20_000),
    "recall": Sizes(100_000, 3000),
    "copying": Sizes(100_000, 3000),
}
OF_DECODERS = ("recall", "copying")  # tokens that predict the next one


def task_source(name: str, config: DataConfig) -> ArraySource:
    """Return ListOps expressions, Pathfinder images, recall or copying.

    Valid and test come first in the generator's order, then train: with more training
    examples they stay the same. Fewer than published shrink them to an eighth of train
    or leave them as they are, whichever is less. Raises ConfigError for sizes that
    can't be.
    """
    sizes = task_sizes(name, config)
    if name == "listops" and not 1 < config.min_length + 2 < config.max_length:
        raise ConfigError(
            f"data.min_length is {config.min_length} and data.max_length "
            f"{config.max_length}; they must be at least 0 and 3 apart"
        )
    if name in OF_DECODERS:
        _check_length(name, config)
    load = {
        "listops": _load_listops,
        "pathfinder": _load_pathfinder,
        "recall": _load_recall,
        "copying": _load_copying,
    }[name]
    return ArraySource(name, (), config, lambda: load(sizes, config))


def _check_length(name: str, config: DataConfig) -> None:
    """Raise ConfigError where an example's tokens aren't said, or are too few."""
    if config.seq_len is None:
        raise ConfigError(
            f"data.source {name} needs data.seq_len, the tokens of an example; set it, "
            "say to 128"
        )
    if name == "recall":
        recall.check_recall(config.seq_len, config.pairs)
    else:
        recall.check_copying(config.seq_len)


def task_sizes(name: str, config: DataConfig) -> Sizes:
    """Return how many examples a config's task has."""
    published = TASKS[name]
    train = published.train if config.num_examples is None else config.num_examples
    if train < 8:
        raise ConfigError(f"data.num_examples is {train}; it must be at least 8")
    return Sizes(train, min(published.held_out, train // 8))


def task_options(config: DataConfig) -> dict[str, int | list[int]]:
    """Return what a config's generated examples depend on, for the manifest."""
    options: dict[str, int | list[int]] = {
        "examples": list(task_sizes(config.source, config)),
        "seed": _SEED,
    }
    if config.source == "listops":
        options["lengths"] = [config.min_length, config.max_length]
    if config.source in OF_DECODERS:
        options["lengths"] = [config.seq_len or 0]
    if config.source == "recall":
        options["pairs"] = config.pairs
    return options


def _load_listops(sizes: Sizes, config: DataConfig) -> Pairs:
    rules = listops.ListOpsRules(
        min_length=config.min_length, max_length=config.max_length
    )
    total = _announce("ListOps expressions", sizes)
    made = listops.generate(total, _SEED, rules)
    return {
        split: (_rows(made, first, last), made.labels[first:last])
        for split, (first, last) in _cuts(sizes).items()
    }


def _rows(made: listops.Expressions, first: int, last: int) -> Ragged:
    starts = made.starts[first : last + 1]
    return Ragged(made.tokens[starts[0] : starts[-1]], starts - starts[0])


def _load_pathfinder(sizes: Sizes, config: DataConfig) -> Pairs:
    total = _announce("Pathfinder images", sizes)
    images, labels = pathfinder.generate(total, _SEED)
    return {
        split: (images[first:last], labels[first:last])
        for split, (first, last) in _cuts(sizes).items()
    }


def _load_recall(sizes: Sizes, config: DataConfig) -> Pairs:
    total = _announce("examples of recall", sizes)
    length = config.seq_len or 0
    return _streams(recall.generate_recall(total, _SEED, length, config.pairs), sizes)


def _load_copying(sizes: Sizes, config: DataConfig) -> Pairs:
    total = _announce("examples of copying", sizes)
    return _streams(recall.generate_copying(total, _SEED, config.seq_len or 0), sizes)


def _streams(made: recall.Examples, sizes: Sizes) -> Pairs:
    """Return examples end to end, so that a row of a stream is one of them.

    A last token is the target of the last row's last place; nobody is asked for it.
    """
    found: Pairs = {}
    for split, (first, last) in _cuts(sizes).items():
        tokens = np.append(made.tokens[first:last], np.uint8(0))
        scored = np.append(made.scored[first:last], np.uint8(0))
        starts = np.arange(last - first + 1) * made.tokens.shape[1]
        found[split] = (Ragged(tokens, starts, scored), None)
    return found


def _announce(what: str, sizes: Sizes) -> int:
    """Return how many examples all splits have; say so where it takes a while."""
    total = sizes.train + 2 * sizes.held_out
    if total > _WORTH_A_NOTE:
        note(f"generating {total:,} {what}, once")
    return total


def _cuts(sizes: Sizes) -> dict[str, tuple[int, int]]:
    held, train = sizes.held_out, sizes.train
    edges = np.cumsum([0, held, held, train]).tolist()
    return {
        "valid": (edges[0], edges[1]),
        "test": (edges[1], edges[2]),
        "train": (edges[2], edges[3]),
    }
