"""Pure array functions under the models, each with a choice of backends."""

from uoe_jax.ops.dense_attention.api import dense_attention
from uoe_jax.ops.expert_mlp.api import expert_mlp
from uoe_jax.ops.grouped_matmul.api import (
    gather_project,
    grouped_matmul,
    project_scatter,
)
from uoe_jax.ops.packing import Packing, combine_rows, gather_rows, pack_choices
from uoe_jax.ops.segment_attention.api import segment_attention
from uoe_jax.ops.split_heads import split_heads
from uoe_jax.ops.swiglu import swiglu

__all__ = [
    "Packing",
    "combine_rows",
    "dense_attention",
    "expert_mlp",
    "gather_project",
    "gather_rows",
    "grouped_matmul",
    "pack_choices",
    "project_scatter",
    "segment_attention",
    "split_heads",
    "swiglu",
]
