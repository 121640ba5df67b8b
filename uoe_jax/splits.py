"""Which mesh axis splits which axis of every parameter, by rule. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from uoe_jax.config import ModelConfig
from uoe_jax.errors import ConfigError, nearest
from uoe_jax.rules import Rules, SplitRule
from uoe_jax.weights import BLOCKS, LAYER, Param, Weight, model_params


def split_axes(model: ModelConfig, rules: Rules) -> dict[str, str]:
    """Return the mesh axis of each dimension of every parameter, "." where it is whole.

    "*" alone: all of it is. What no rule names is as `weights.py` says. Only fsdp can
    be moved: a layer gathers what it splits, whichever axis that is, while tensor's
    axis is the one that the layer sums over.

    Raises:
      ConfigError: a rule that matches nothing, two that match the same parameter, an
        axis that the weight hasn't or that can't be split.
    """
    params = model_params(model)
    used: dict[str, SplitRule] = {}
    for rule in rules.parsed():
        names = [name for name in params if fnmatchcase(name, rule.pattern)]
        if not names:
            raise ConfigError(
                f"the layout rule {rule.pattern!r} matches no parameter; "
                f"{nearest(rule.pattern, params)}"
            )
        for name in names:
            if name in used:
                raise ConfigError(
                    f"{name} matches the layout rules {used[name].pattern!r} and "
                    f"{rule.pattern!r}; keep one"
                )
            used[name] = rule
    axes = {name: _axes(name, param, used.get(name)) for name, param in params.items()}
    _check_stacks(axes)
    return axes


def whole_weights(model: ModelConfig, rules: Rules) -> dict[str, Param]:
    """Return the parameters that fsdp would split and that the rules leave whole."""
    if not rules:
        return {}
    axes = split_axes(model, rules)
    return {
        name: param
        for name, param in model_params(model).items()
        if param.weight.fsdp and "fsdp" not in axes[name]
    }


def _axes(name: str, param: Param, rule: SplitRule | None) -> str:
    weight = param.weight
    usual = weight.mesh_axes(param.routed)
    if rule is None:
        return usual
    tensor = "" if usual == "*" else _letter(weight, usual.split(), "tensor")
    asked = f"the layout rule {str(rule)!r}"
    for axis, letter in rule.letters.items():
        if letter and letter not in weight.axes:
            raise ConfigError(
                f"{asked}: {name} has the axes {' '.join(weight.axes)}, none is "
                f"{letter!r}"
            )
        if axis == "tensor" and letter != tensor:
            place = (
                f"splits {name} along {tensor}" if tensor else f"leaves {name} whole"
            )
            raise ConfigError(
                f"{asked}: tensor {place}, as its layer is computed; leave it out"
            )
    if "fsdp" not in rule.letters:
        return usual
    letter = rule.letters["fsdp"]
    if not weight.fsdp:
        raise ConfigError(
            f"{asked}: fsdp doesn't split {name}, which is read whole everywhere; name "
            "matrices only, such as *.attention.w*"
        )
    if letter == LAYER or (letter and letter == tensor):
        why = "layers are read one by one" if letter == LAYER else "tensor splits that"
        free = [a for a in weight.axes if a not in (LAYER, tensor)]
        raise ConfigError(
            f"{asked}: fsdp can't split {name} along {letter}: {why}; use "
            f"{', '.join(free)}"
        )
    names = {letter: "fsdp", tensor: "tensor"}
    names.pop("", None)
    return " ".join(names.get(a, ".") for a in weight.axes) if names else "*"


def _letter(weight: Weight, words: list[str], axis: str) -> str:
    return weight.axes[words.index(axis)] if axis in words else ""


def _check_stacks(axes: Mapping[str, str]) -> None:
    """Raise ConfigError where blocks of several kinds split one weight differently.

    All are gathered by one table of the names inside a block.
    """
    places: dict[str, tuple[str, int | None]] = {}
    for name, words in axes.items():
        if not name.startswith(BLOCKS):
            continue
        inner = name.removeprefix(BLOCKS).partition(".")[2]
        found = words.split()[::-1]  # from the end: kinds differ at the front
        place = found.index("fsdp") if "fsdp" in found else None
        first, before = places.setdefault(inner, (name, place))
        if before != place:
            raise ConfigError(
                f"layout rules split {first} and {name} differently; name both by one "
                f"pattern, such as {BLOCKS}*.{inner}"
            )
