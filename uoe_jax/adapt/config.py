"""What an adapter is: method, ranks, targets, init. Imports no jax."""

from __future__ import annotations

import dataclasses
import fnmatch
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Fixed, arg

from uoe_jax.errors import ConfigError, nearest, shown
from uoe_jax.fields import Checked, Count, Fraction, Positive, Whole, check_ranges
from uoe_jax.options import pairs

Method = Literal["tucker", "lora"]
Init = Literal["flora", "loralib", "peft", "gaussian", "orthonormal", "hosvd"]
Path = Literal["auto", "delta", "fused", "factored"]

# Published inits by method; what each draws is in `init.py`.
INITS: dict[str, tuple[str, ...]] = {
    "tucker": ("flora", "loralib", "peft", "orthonormal", "hosvd"),
    "lora": ("peft", "gaussian", "orthonormal", "hosvd"),
}
TARGETS = ("*attention.w?", "*.mlp.w_*")  # every projection of the blocks


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Checked):
    """One adapter: which weights, which factors, how they start and how they count."""

    method: Method = "tucker"  # three factors, or two

    rank: Count = 8  # of the factors; cut where a weight has less

    # Tucker: of the spatial modes of a convolution. No option: runs have none.
    kernel_rank: Fixed[Count] = 2

    # Shell patterns on parameter names; every projection of the blocks by default.
    targets: tuple[str, ...] = TARGETS

    # First match wins over the rank; 0 leaves a weight out, as in PEFT.
    rank_pattern: Annotated[
        dict[str, Whole], pairs("PATTERN=RANK", example="*.wq=16")
    ] = field(default_factory=dict)

    alpha: Positive | None = None  # scale; the init's published default if not given

    # How factors start, as published; docs/adapters.md has what each draws.
    init: Init = "peft"

    split_heads: bool = False  # Tucker: heads, groups and head width as own modes

    share_experts: bool = False  # a union's experts share their factors

    # Scale alpha over the root of the rank (Kalajdzievski 2023).
    use_rslora: Annotated[bool, arg(name="rslora")] = False

    # Learned magnitudes of the outputs (Liu et al. 2024).
    use_dora: Annotated[bool, arg(name="dora")] = False

    dropout: Fraction = 0.0  # of the adapter's input, in training

    def __hash__(self) -> int:
        return hash(repr(self))


def check_adapter(config: AdapterConfig) -> None:
    """Raise ConfigError for a setting that can't be."""
    check_ranges(config)
    if not config.targets:
        raise ConfigError("targets is empty; name at least one pattern")
    allowed = INITS[config.method]
    if config.init not in allowed:
        raise ConfigError(
            f"init is {config.init!r}; {config.method} takes {', '.join(allowed)}"
        )
    if config.use_dora and config.dropout:
        raise ConfigError(
            f"dropout is {config.dropout} with use_dora; DoRA norms the whole weight, "
            "so it takes no input dropout: set one of them to 0"
        )
    if config.share_experts and config.init == "hosvd":
        raise ConfigError(
            "init is 'hosvd' with share_experts; experts have no common leading part: "
            "choose another init"
        )
    if config.split_heads and config.method == "lora":
        raise ConfigError("split_heads is on; only Tucker has modes to split")


def rank_for(config: AdapterConfig, name: str) -> int:
    """Return the rank of a parameter by its dotted name; 0 leaves it out."""
    for pattern, rank in config.rank_pattern.items():
        if fnmatch.fnmatchcase(name, pattern):
            return rank
    return config.rank


def scale_for(config: AdapterConfig, rank: int) -> float:
    """Return the factor of the delta, by the published rule of the init.

    flora: alpha itself, default 1. loralib: (alpha or r) / (r + 1e-5). Others: alpha/r
    with default alpha 2r, or alpha/sqrt(r) with `use_rslora`. orthonormal and hosvd
    count as they are with alpha unset.
    """
    alpha = config.alpha
    if config.use_rslora:
        return (2.0 * rank if alpha is None else alpha) / rank**0.5
    match config.init:
        case "flora":
            return 1.0 if alpha is None else alpha
        case "loralib":
            return (alpha or rank) / (rank + 1e-5)
        case "orthonormal" | "hosvd":
            return 1.0 if alpha is None else alpha / rank
    return 2.0 if alpha is None else alpha / rank


def adapter_from_dict(raw: dict) -> AdapterConfig:
    """Return the config whose fields these are; ConfigError for unknown fields."""
    known = {f.name for f in dataclasses.fields(AdapterConfig)}
    for name in raw:
        if name not in known:
            fix = nearest(str(name), known)
            raise ConfigError(f"adapter has no field {shown(name)}; {fix}")
    config = AdapterConfig(**raw)
    check_adapter(config)
    return config
