"""What an adapter is: method, ranks, targets, init. Imports no jax."""

from __future__ import annotations

import dataclasses
import fnmatch
from dataclasses import dataclass, field
from typing import Literal

from uoe_jax.errors import ConfigError, nearest, shown
from uoe_jax.fields import Checked, Count, Fraction, Positive, Whole, check_ranges

Method = Literal["tucker", "lora"]
Init = Literal["flora", "loralib", "peft", "gaussian", "orthonormal", "hosvd"]
Path = Literal["auto", "delta", "fused", "factored"]

# Published inits by method; what each draws is in `init.py`.
INITS: dict[str, tuple[str, ...]] = {
    "tucker": ("flora", "loralib", "peft", "orthonormal", "hosvd"),
    "lora": ("peft", "gaussian", "orthonormal", "hosvd"),
}
TARGETS = ("*.attention.w?", "*.mlp.w_*")  # every projection of the blocks


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Checked):
    """One adapter: which weights, which factors, how they start and how they count."""

    method: Method = "tucker"
    rank: Count = 8  # of every wide mode; clamped to the mode's size
    kernel_rank: Count = 2  # Tucker: of the spatial modes of a convolution
    targets: tuple[str, ...] = TARGETS  # shell patterns on dotted parameter names
    # First match wins over `rank`; 0 leaves a weight out, as PEFT's rank_pattern.
    rank_pattern: dict[str, Whole] = field(default_factory=dict)
    alpha: Positive | None = None  # scale; None: the published variant's default
    init: Init = "peft"
    split_heads: bool = False  # Tucker: key head, group and head width as own modes
    share_experts: bool = False  # one set of factors for all experts of a union
    use_rslora: bool = False  # scale alpha / sqrt(r) (Kalajdzievski 2023)
    use_dora: bool = False  # learned magnitudes (Liu et al. 2024, DoRA)
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
