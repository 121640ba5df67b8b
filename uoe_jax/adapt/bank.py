"""Several adapters side by side: padded to one rank, switched, mixed, trained at once.

Zero columns of a factor meet zero entries of the core (or of B), so they get zero
gradients and stay zero: padding changes neither values nor training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax.adapt.adapters import Adapters, Weights
from uoe_jax.adapt.plan import RANK_LETTERS, LeafPlan
from uoe_jax.errors import ConfigError

_Arrays = tuple[Weights, dict[str, Array], Weights]


def pad_ranks(adapters: Adapters, like: Adapters | Sequence[LeafPlan]) -> Adapters:
    """Return the adapter with zeros up to the ranks of another of the same kind.

    Raises ConfigError if it has a higher rank, or other weights or parts.
    """
    plans = like.plans if isinstance(like, Adapters) else tuple(like)
    _check_alike(adapters.plans, plans)
    weights, anchor = {}, {}
    for plan, wide in zip(adapters.plans, plans, strict=True):
        weights[plan.name] = _pad_parts(plan, wide, adapters.weights[plan.name])
        if plan.name in adapters.anchor:
            anchor[plan.name] = _pad_parts(plan, wide, adapters.anchor[plan.name])
    return dataclasses.replace(
        adapters, weights=weights, anchor=anchor, plans=tuple(plans)
    )


def _check_alike(first: Sequence[LeafPlan], second: Sequence[LeafPlan]) -> None:
    """Raise ConfigError unless two adapters have the same parts of the same weights."""
    if [p.name for p in first] != [p.name for p in second]:
        raise ConfigError(
            "adapters of different weights can't stand side by side; stack those with "
            "the same targets"
        )
    for a, b in zip(first, second, strict=True):
        if a.labels != b.labels:
            raise ConfigError(
                f"{a.name} has parts {[p for p, _ in a.labels]} and "
                f"{[p for p, _ in b.labels]}; stack adapters of one method"
            )


def _pad_parts(
    plan: LeafPlan, wide: LeafPlan, parts: dict[str, Array]
) -> dict[str, Array]:
    shapes = wide.shapes
    padded = {}
    for part, array in parts.items():
        widths = [
            (0, n - m) for n, m in zip(shapes[part], plan.shapes[part], strict=True)
        ]
        if min((after for _, after in widths), default=0) < 0:
            raise ConfigError(
                f"{plan.name} has ranks {list(plan.ranks)}, more than "
                f"{list(wide.ranks)}; pad to the highest"
            )
        padded[part] = jnp.pad(array, widths)
    return padded


def widest(sets: Sequence[Adapters]) -> tuple[LeafPlan, ...]:
    """Return plans with the highest rank of every mode over some adapters."""
    for adapters in sets[1:]:
        _check_alike(sets[0].plans, adapters.plans)
    plans = []
    for group in zip(*(adapters.plans for adapters in sets), strict=True):
        ranks = tuple(max(r) for r in zip(*(plan.ranks for plan in group), strict=True))
        plans.append(dataclasses.replace(group[0], ranks=ranks))
    return tuple(plans)


def stack_adapters(
    sets: Sequence[Adapters], like: Sequence[LeafPlan] | None = None
) -> Adapters:
    """Return a bank of adapters of the same weights, padded to the highest ranks."""
    plans = widest(sets) if like is None else tuple(like)
    padded = [pad_ranks(adapters, plans) for adapters in sets]
    if len({tuple(sorted(p.anchor)) for p in padded}) > 1:
        raise ConfigError("adapters with and without a hosvd start can't be stacked")
    stack = lambda *arrays: jnp.stack(arrays)
    trees = [(p.weights, p.scales, p.anchor) for p in padded]
    weights, scales, anchor = jax.tree.map(stack, *trees)
    plans = tuple(dataclasses.replace(plan, bank=True) for plan in plans)
    return Adapters(weights=weights, scales=scales, anchor=anchor, plans=plans)


def select_adapter(bank: Adapters, index: int | Int[Array, ""]) -> Adapters:
    """Return one adapter of a bank. The index may be traced: no recompilation.

    Raises ConfigError for a number that the bank hasn't; traced ones give NaN there.
    """
    _check_index(bank, index)
    take = lambda array: jnp.take(array, index, axis=0)
    return _single(bank, jax.tree.map(take, _arrays(bank)))


def set_adapter(bank: Adapters, index: int, adapters: Adapters) -> Adapters:
    """Return the bank with one place taken by another adapter of no higher rank.

    Raises ConfigError for a place that the bank hasn't, or as `pad_ranks` does.
    """
    _check_index(bank, index)
    padded = _arrays(pad_ranks(adapters, [_one(plan) for plan in bank.plans]))
    put = lambda array, new: array.at[index].set(new)
    weights, scales, anchor = jax.tree.map(put, _arrays(bank), padded)
    return dataclasses.replace(bank, weights=weights, scales=scales, anchor=anchor)


def mix_adapters(bank: Adapters, mix: Float[Array, " K"]) -> Adapters:
    """Return the bank as one sum of its adapters, each times its share of `mix`.

    Raises ConfigError for another number of shares than adapters.
    """
    if mix.shape != (_count(bank),):
        raise ConfigError(
            f"mix has shape {list(mix.shape)}; give a share to each of the "
            f"{_count(bank)} adapters"
        )
    scales = {
        name: scale * mix.astype(scale.dtype) for name, scale in bank.scales.items()
    }
    return dataclasses.replace(bank, scales=scales)


def _count(bank: Adapters) -> int:
    """Return how many adapters a bank has; ConfigError for a single one."""
    if not all(plan.bank for plan in bank.plans):
        raise ConfigError("this is one adapter, not a bank; stack_adapters makes banks")
    return next(iter(bank.scales.values())).shape[0]


def _check_index(bank: Adapters, index: Any) -> None:
    count = _count(bank)
    if isinstance(index, int) and not -count <= index < count:
        raise ConfigError(f"adapter {index} of a bank of {count}; count from 0")


def _arrays(adapters: Adapters) -> _Arrays:
    return adapters.weights, adapters.scales, adapters.anchor


def _one(plan: LeafPlan) -> LeafPlan:
    return dataclasses.replace(plan, bank=False)


def _single(
    bank: Adapters, arrays: tuple[Weights, dict[str, Array], Weights]
) -> Adapters:
    weights, scales, anchor = arrays
    plans = tuple(_one(plan) for plan in bank.plans)
    return Adapters(weights=weights, scales=scales, anchor=anchor, plans=plans)


def as_tucker(adapters: Adapters) -> Adapters:
    """Return LoRA adapters as Tucker ones with a core of ones on the diagonal.

    Raises ConfigError for convolutions, whose A isn't a factor of one mode.
    """
    plans, weights, anchor = [], {}, {}
    for plan in adapters.plans:
        parts = adapters.weights[plan.name]
        if plan.method != "lora":
            plans.append(plan)
            weights[plan.name] = parts
            continue
        changed = _tucker_plan(plan)
        plans.append(changed)
        weights[plan.name] = _tucker_parts(plan, changed, parts)
        if plan.name in adapters.anchor:
            anchor[plan.name] = _tucker_parts(plan, changed, adapters.anchor[plan.name])
    return dataclasses.replace(
        adapters, weights=weights, anchor=anchor, plans=tuple(plans)
    )


def _tucker_plan(plan: LeafPlan) -> LeafPlan:
    axes = plan.axes
    if axes.kernel:
        raise ConfigError(f"{plan.name} is a convolution: its LoRA isn't a Tucker form")
    words = dict(plan.labels)
    first, second = RANK_LETTERS[:2]
    out = words["b"].replace(first, "") + second
    labels = (
        ("core", axes.batch + first + second),
        (f"factor_{axes.ins}", words["a"]),
        (f"factor_{axes.outs}", out),
        *((p, w) for p, w in plan.labels if p == "magnitude"),
    )
    ranks = (plan.ranks[0], plan.ranks[0])
    return dataclasses.replace(plan, method="tucker", ranks=ranks, labels=labels)


def _tucker_parts(
    plan: LeafPlan, changed: LeafPlan, parts: dict[str, Array]
) -> dict[str, Array]:
    words, axes = dict(plan.labels), plan.axes
    rank, lead = plan.ranks[0], 1 if plan.bank else 0
    core = changed.shapes["core"]
    if plan.bank:
        core = (parts["a"].shape[0], *core)
    new = {
        "core": jnp.broadcast_to(jnp.eye(rank), core),
        f"factor_{axes.ins}": parts["a"],
        f"factor_{axes.outs}": jnp.moveaxis(
            parts["b"], lead + words["b"].index(RANK_LETTERS[0]), -1
        ),
    }
    if "magnitude" in parts:
        new["magnitude"] = parts["magnitude"]
    return new
