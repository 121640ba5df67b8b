"""PartitionSpecs of parameters and optimizer state, by the pattern of their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec

from uoe_jax.config import ModelConfig
from uoe_jax.errors import ConfigError
from uoe_jax.rules import NO_RULES, Rules
from uoe_jax.splits import split_axes
from uoe_jax.weights import ROTARY_PAIRS, rotary_pairs


class Rule(NamedTuple):
    """Names that match `pattern` whole, and the mesh axis of each of their dimensions.

    `axes` is a word a dimension: an axis, or "." for a dimension that stays whole. "*"
    alone leaves everything whole.
    """

    pattern: str
    axes: str


def default_rules(model: ModelConfig, rules: Rules = NO_RULES) -> tuple[Rule, ...]:
    """Return the rules of a model, one a parameter: fsdp along the model width of every
    matrix, tensor along experts, and along heads and MLP columns where a layer is
    dense; but fsdp as `rules` say."""
    return tuple(
        Rule(re.escape(name), axes) for name, axes in split_axes(model, rules).items()
    )


def param_specs(
    shapes: Mapping[str, tuple[int, ...]],
    rules: Sequence[Rule],
    sizes: Mapping[str, int],
) -> dict[str, PartitionSpec]:
    """Return the spec of every parameter by name; axes of one device are left out.

    Raises:
      ConfigError: a parameter that no rule or more than one matches, a rule that
        matches none, or a dimension that its axis doesn't divide.
    """
    used, specs = set(), {}
    for name, shape in shapes.items():
        found = [rule for rule in rules if re.fullmatch(rule.pattern, name)]
        if len(found) != 1:
            patterns = " and ".join(rule.pattern for rule in found)
            raise ConfigError(
                f"parameter {name} {list(shape)} "
                + (f"matches {patterns}; keep one" if found else "has no layout rule")
                + ("" if found else "; add one to uoe_jax/weights.py")
            )
        used.add(found[0])
        specs[name] = _spec(name, shape, found[0], sizes)
    for rule in rules:
        if rule not in used:
            raise ConfigError(
                f"layout rule {rule.pattern} matches no parameter; correct or remove it"
            )
    return specs


def _spec(
    name: str, shape: tuple[int, ...], rule: Rule, sizes: Mapping[str, int]
) -> PartitionSpec:
    if rule.axes == "*":
        return PartitionSpec()
    axes = rule.axes.split()
    if len(axes) != len(shape):
        raise ConfigError(
            f"layout rule {rule.pattern} names {len(axes)} dimensions and {name} is "
            f"{list(shape)}; name {len(shape)}"
        )
    for axis, size in zip(axes, shape, strict=True):
        if size % sizes.get(axis, 1):
            raise ConfigError(
                f"mesh.{axis} {sizes[axis]} doesn't divide dimension {size} of {name} "
                f"{list(shape)}; use a divisor of {size}"
            )
    return PartitionSpec(*[a if sizes.get(a, 1) > 1 else None for a in axes])


def pair_specs(
    model: ModelConfig, sizes: Mapping[str, int]
) -> dict[str, PartitionSpec]:
    """Return the spec of the pairs that narrow heads keep: split with their heads."""
    axes = ROTARY_PAIRS.stacked().mesh_axes(False)
    return {
        name: _spec(name, shape, Rule(re.escape(name), axes), sizes)
        for name, shape in rotary_pairs(model).items()
    }


def state_owner(
    name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Return the parameter that an optimizer's array is about; None: it is of none.

    Its name ends in the parameter's and its shape is the same.
    """
    parts = name.split(".")
    for start in range(len(parts)):
        owner = ".".join(parts[start:])
        if shapes.get(owner) == shape:
            return owner
    return None


def spec_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """Return the mesh axes that a spec names."""
    return tuple(axis for axis in spec if axis is not None)


def axis_place(spec: PartitionSpec, axis: Any) -> int | None:
    """Return the dimension split over an axis, counted from the end; None: none is."""
    for place, named in enumerate(spec):
        if named == axis:
            return place - len(spec)
    return None
