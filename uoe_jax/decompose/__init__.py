"""Dense parameters to union parameters and back, exact; no training."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uoe_jax.decompose.cut import Cut
    from uoe_jax.decompose.group import GROUPINGS, order_neurons
    from uoe_jax.decompose.split import (
        merge_params,
        merged_config,
        split_params,
        union_config,
    )
    from uoe_jax.model import flat_params, with_params
    from uoe_jax.runs.probe import ProbeResult, probe

__all__ = [
    "GROUPINGS",
    "Cut",
    "ProbeResult",
    "flat_params",
    "merge_params",
    "merged_config",
    "order_neurons",
    "probe",
    "split_params",
    "union_config",
    "with_params",
]

_FILES = {
    "decompose.cut": ("Cut",),
    "decompose.group": ("GROUPINGS", "order_neurons"),
    "decompose.split": (
        "merge_params",
        "merged_config",
        "split_params",
        "union_config",
    ),
    "model": ("flat_params", "with_params"),
    "runs.probe": ("ProbeResult", "probe"),
}
_FILE = {name: file for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: options are read without jax."""
    if name not in _FILE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"uoe_jax.{_FILE[name]}"), name)
