"""Dense parameters to union parameters and back, exact; no training."""

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
