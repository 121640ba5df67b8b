"""Tucker and LoRA adapters of any weight, outside of the model."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uoe_jax.adapt.adapters import (
        Adapters,
        count_adapter_params,
        init_adapters,
    )
    from uoe_jax.adapt.apply import adapted_params, apply_adapted, leaf_delta
    from uoe_jax.adapt.bank import (
        as_tucker,
        mix_adapters,
        pad_ranks,
        select_adapter,
        set_adapter,
        stack_adapters,
    )
    from uoe_jax.adapt.config import AdapterConfig
    from uoe_jax.adapt.plan import LeafPlan
    from uoe_jax.weights import WeightAxes

__all__ = [
    "AdapterConfig",
    "Adapters",
    "LeafPlan",
    "WeightAxes",
    "adapted_params",
    "apply_adapted",
    "as_tucker",
    "count_adapter_params",
    "init_adapters",
    "leaf_delta",
    "mix_adapters",
    "pad_ranks",
    "select_adapter",
    "set_adapter",
    "stack_adapters",
]

_FILES = {
    "adapt.adapters": ("Adapters", "count_adapter_params", "init_adapters"),
    "adapt.apply": ("adapted_params", "apply_adapted", "leaf_delta"),
    "adapt.bank": (
        "as_tucker",
        "mix_adapters",
        "pad_ranks",
        "select_adapter",
        "set_adapter",
        "stack_adapters",
    ),
    "adapt.config": ("AdapterConfig",),
    "adapt.plan": ("LeafPlan",),
    "weights": ("WeightAxes",),
}
_FILE = {name: file for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: options are read without jax."""
    if name not in _FILE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"uoe_jax.{_FILE[name]}"), name)
