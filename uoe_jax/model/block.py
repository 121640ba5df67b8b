"""One transformer block: normalise, attend, add; normalise, apply the MLP, add."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float

from uoe_jax.config import AttentionKind, MlpKind, ModelConfig
from uoe_jax.model.attention import DenseAttention, KeyValue, UnionAttention
from uoe_jax.model.balance_stats import Stats
from uoe_jax.model.context import Context
from uoe_jax.model.linear import dropout, fold_key
from uoe_jax.model.mlp import DenseMlp, UnionMlp
from uoe_jax.model.moba import MobaAttention
from uoe_jax.model.moe import MoeMlp
from uoe_jax.model.norm import Norm
from uoe_jax.model.sharded_dispatch import run_part
from uoe_jax.model.shared_kv import MohAttention, SharedKvAttention

ATTENTION = {
    "dense": DenseAttention,
    "union": UnionAttention,
    "moba": MobaAttention,
    "moh": MohAttention,
}
MLP = {"dense": DenseMlp, "union": UnionMlp, "moe": MoeMlp}


class Block(nnx.Module):
    """Pre-norm block with attention and MLP of the given kinds."""

    def __init__(
        self,
        config: ModelConfig,
        attention: AttentionKind,
        mlp: MlpKind,
        *,
        rngs: nnx.Rngs,
    ):
        self.rate = config.dropout
        self.attention_norm = Norm(config)
        kind = ATTENTION[attention]
        if attention == "union" and config.union_for("attention").shared_kv:
            kind = SharedKvAttention
        self.attention = kind(config, rngs=rngs)
        self.mlp_norm = Norm(config)
        self.mlp = MLP[mlp](config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, key: jax.Array | None = None
    ) -> tuple[Float[Array, "B T D"], dict[str, Stats], KeyValue]:
        """Return the block's output, routing statistics by part, keys and values."""
        normed = self.attention_norm(x)
        y, attention, key_value = run_part(self.attention, normed, context)
        x = x + dropout(y, self.rate, fold_key(key, 0))
        y, mlp = run_part(self.mlp, self.mlp_norm(x), context)
        x = x + dropout(y, self.rate, fold_key(key, 1))
        parts = {"attention": attention, "mlp": mlp}
        return x, {name: part for name, part in parts.items() if part}, key_value
