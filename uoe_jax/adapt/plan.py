"""Which weights get which factors: patterns, axes of a weight, shapes of factors."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from uoe_jax.adapt.config import AdapterConfig, check_adapter, rank_for, scale_for
from uoe_jax.adapt.evaluate.equation import Roles, lora_network, tucker_network
from uoe_jax.errors import ConfigError, nearest
from uoe_jax.linalg.tucker import clamp_ranks
from uoe_jax.weights import EXPERT, LAYER, WeightAxes, find_weight

RANK_LETTERS = "ABCDEFGH"
PACKAGE = f"{Path(__file__).parents[1]}/"  # whose frames a warning doesn't point to
STACKS = "*blocks.*"
EMBEDDING, HEAD = "embed.embedding", "head.weight"


@dataclass(frozen=True, kw_only=True)
class LeafPlan:
    """The adapter of one weight: labels and shapes of its factors. Hashable."""

    name: str
    axes: WeightAxes
    shape: tuple[int, ...]
    method: str  # lora, tucker or vector
    rank: int
    ranks: tuple[int, ...]  # of the modes (Tucker), or the one rank
    labels: tuple[tuple[str, str], ...]  # (part, its letters), in network order
    dora: bool = False
    dropout: float = 0.0
    bank: bool = False  # parts have a leading axis of several adapters

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every letter."""
        sizes = dict(zip(self.axes.axes, self.shape, strict=True))
        return sizes | dict(zip(RANK_LETTERS, self.ranks, strict=False))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every part, of one adapter."""
        sizes = self.sizes
        return {part: tuple(sizes[a] for a in word) for part, word in self.labels}

    @property
    def num_params(self) -> int:
        """Trained numbers of one adapter."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def axes_of(
    name: str, shape: Sequence[int], given: Mapping[str, WeightAxes]
) -> WeightAxes:
    """Return a parameter's axes: given ones, this library's, or those of its shape.

    One axis is a vector, two are [in, out], three to five a convolution kernel
    [..., in, out] (HWIO). Raises ConfigError for another number of axes.
    """
    for pattern, axes in given.items():
        if fnmatch.fnmatchcase(name, pattern):
            return _fitting(name, shape, axes)
    if (known := find_weight(name)) is not None:
        axes = WeightAxes(
            axes=known.axes, ins=known.ins, outs=known.outs, heads=known.heads
        )
        return _fitting(name, shape, axes)
    stacked = fnmatch.fnmatchcase(name, STACKS)
    inner = len(shape) - stacked
    lead = LAYER if stacked else ""
    if inner == 1:
        return WeightAxes(axes=lead + "o", ins="", outs="o")
    if inner in (2, 3, 4, 5):
        kernel = "xyz"[: inner - 2]
        axes = f"{lead}{kernel}io"
        return WeightAxes(axes=axes, ins="i", outs="o", kernel=kernel)
    raise ConfigError(
        f"{name} has shape {list(shape)}; state its axes as WeightAxes(axes=..., "
        "ins=..., outs=...)"
    )


def _fitting(name: str, shape: Sequence[int], axes: WeightAxes) -> WeightAxes:
    """Return given axes, with the layers' before them inside a stack of blocks."""
    missing = len(shape) - len(axes.axes)
    if missing == 1 and fnmatch.fnmatchcase(name, STACKS):
        return dataclasses.replace(axes, axes=LAYER + axes.axes)
    if missing:
        raise ConfigError(
            f"{name} has shape {list(shape)} but its axes are {axes.axes!r}; "
            "state one letter for each axis"
        )
    return axes


def make_plans(
    shapes: Mapping[str, Sequence[int]],
    config: AdapterConfig,
    axes: Mapping[str, WeightAxes] | None = None,
) -> tuple[LeafPlan, ...]:
    """Return the adapters of all parameters that the config's patterns choose.

    `axes` describes weights by pattern, before this library's own. Raises ConfigError
    for a pattern that matches nothing.
    """
    check_adapter(config)
    for pattern in config.targets:
        if not fnmatch.filter(shapes, pattern):
            raise ConfigError(
                f"no weight matches {pattern!r}; {_nearest_tail(pattern, shapes)}"
            )
    match = fnmatch.fnmatchcase
    chosen = [n for n in shapes if any(match(n, p) for p in config.targets)]
    for pattern in config.rank_pattern:
        if not fnmatch.filter(chosen, pattern):
            raise ConfigError(
                f"rank pattern {pattern!r} matches no weight among the targets; "
                + _nearest_tail(pattern, chosen)
            )
    plans: list[LeafPlan] = []
    for name in chosen:
        if rank := rank_for(config, name):
            place = axes_of(name, shapes[name], axes or {})
            plans.append(_plan_leaf(name, tuple(shapes[name]), place, rank, config))
    if not plans:
        raise ConfigError("every matching weight has rank 0; give one of them a rank")
    return tuple(plans)


def _nearest_tail(pattern: str, names: Iterable[str]) -> str:
    """Return a hint of patterns that match: `*` and the last part of a name."""
    tails = {"*" + name.rpartition(".")[2] for name in names}
    return nearest("*" + pattern.rpartition(".")[2].strip("*"), tails)


def warn_of(plans: Sequence[LeafPlan], use_dora: bool = False) -> None:
    """Warn of ranks that a weight can't have, and of adapters as large as the base.

    And of magnitudes that no weight has.
    """
    if use_dora and not any(plan.dora for plan in plans):
        warnings.warn(
            f"use_dora changes nothing: {plans[0].name} and all other targets are "
            "vectors, whose plain delta moves their size as well",
            skip_file_prefixes=(PACKAGE,),
        )
    cut = [plan for plan in plans if _is_cut(plan)]
    if cut:
        warnings.warn(
            f"rank {cut[0].rank} is more than {cut[0].name} can have; "
            f"{list(cut[0].ranks)} used, and so in {len(cut)} of {len(plans)} weights",
            skip_file_prefixes=(PACKAGE,),
        )
    ranked = [plan for plan in plans if plan.method != "vector"]
    size = sum(plan.num_params for plan in ranked)
    base = sum(math.prod(plan.shape) for plan in ranked)
    if ranked and size >= base:
        warnings.warn(
            f"adapters have {size:,} parameters, the weights they adapt {base:,}; "
            "lower the rank",
            skip_file_prefixes=(PACKAGE,),
        )


def warn_of_tied(plans: Sequence[LeafPlan], names: Iterable[str]) -> None:
    """Warn of an embedding that is the output layer too, so that both change."""
    adapted = {plan.name for plan in plans}
    if EMBEDDING in adapted and HEAD not in set(names):
        warnings.warn(
            f"{EMBEDDING} is the output layer too (tied): the adapter changes the "
            "lookup and the logits, where PEFT's changes the lookup alone; leave it "
            "out of the targets or train with model.tie_embeddings off",
            skip_file_prefixes=(PACKAGE,),
        )


def _is_cut(plan: LeafPlan) -> bool:
    """Whether a side of the weight as a whole is narrower than the rank."""
    if plan.method == "lora":
        return plan.ranks[0] < plan.rank
    words = dict(plan.labels)
    sides = (f"factor_{side}" for side in (plan.axes.ins, plan.axes.outs))
    return any(
        plan.sizes[words[part][-1]] < plan.rank for part in sides if part in words
    )


def _plan_leaf(
    name: str,
    shape: tuple[int, ...],
    axes: WeightAxes,
    rank: int,
    config: AdapterConfig,
) -> LeafPlan:
    sizes = dict(zip(axes.axes, shape, strict=True))
    shared = EXPERT if config.share_experts and EXPERT in axes.batch else ""
    if not axes.ins:
        # A plain delta moves a vector's size as well: DoRA has nothing to add to it.
        return LeafPlan(
            name=name,
            axes=axes,
            shape=shape,
            method="vector",
            rank=1,
            ranks=(),
            labels=(("delta", axes.axes),),
        )
    width = lambda word: math.prod(sizes[a] for a in word)
    if config.method == "lora":
        limit = min(width(axes.kernel + axes.ins), width(axes.outs))
        ranks = (min(rank, limit),)
        roles = Roles(axes.batch, axes.kernel + axes.ins, axes.outs)
        words = lora_network(roles, RANK_LETTERS[0], shared)
        labels = tuple(zip(("a", "b"), words, strict=True))
    else:
        modes = _modes(axes, config.split_heads)
        wanted = [config.kernel_rank if m in axes.kernel else rank for m in modes]
        ranks = clamp_ranks([width(mode) for mode in modes], wanted)
        letters = RANK_LETTERS[: len(modes)]
        words = tucker_network(axes.batch, modes, letters, shared)
        parts = ("core", *(f"factor_{mode}" for mode in modes))
        labels = tuple(zip(parts, words, strict=True))
    if config.use_dora:
        labels = (*labels, ("magnitude", axes.batch + axes.outs))
    return LeafPlan(
        name=name,
        axes=axes,
        shape=shape,
        method=config.method,
        rank=rank,
        ranks=ranks,
        labels=labels,
        dora=config.use_dora,
        dropout=config.dropout,
    )


def _modes(axes: WeightAxes, split_heads: bool) -> tuple[str, ...]:
    """Return Tucker's modes: in, out, then the spatial ones; the official order."""
    modes: list[str] = []
    for side in (axes.ins, axes.outs):
        split = split_heads and set(side) <= set(axes.heads)
        modes += list(side) if split else [side]
    return (*modes, *axes.kernel)


def leaf_scale(plan: LeafPlan, config: AdapterConfig) -> float:
    """Return the scale of a planned adapter; a vector counts as it is."""
    return 1.0 if plan.method == "vector" else scale_for(config, plan.rank)
