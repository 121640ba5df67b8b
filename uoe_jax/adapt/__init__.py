"""Tucker and LoRA adapters of any weight, outside of the model."""

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
