"""GPT-2: learned positions, LayerNorm with biases, one tensor of q, k and v."""

from __future__ import annotations

from typing import Any

from uoe_jax.config import ModelConfig
from uoe_jax.interop.families.fields import Raw, only, read, size
from uoe_jax.interop.families.shared import read_gelu, write_gelu
from uoe_jax.interop.names import Family, Table

OUTER: Table = {
    "embed.embedding": ("transformer.wte.weight", "v d"),
    "embed.position.embedding": ("transformer.wpe.weight", "t d"),
    "trunk.norm.scale": ("transformer.ln_f.weight", "d"),
    "trunk.norm.bias": ("transformer.ln_f.bias", "d"),
    "head.weight": ("lm_head.weight", "v d"),
}
_LAYER = "transformer.h.{layer}."
# Its Conv1D has [in, out], so nothing is turned.
BLOCKS: Table = {
    "attention_norm.scale": (_LAYER + "ln_1.weight", "d"),
    "attention_norm.bias": (_LAYER + "ln_1.bias", "d"),
    "mlp_norm.scale": (_LAYER + "ln_2.weight", "d"),
    "mlp_norm.bias": (_LAYER + "ln_2.bias", "d"),
    "attention.wq": (_LAYER + "attn.c_attn.weight", "d (0/3 j g h)"),
    "attention.wk": (_LAYER + "attn.c_attn.weight", "d (1/3 j h)"),
    "attention.wv": (_LAYER + "attn.c_attn.weight", "d (2/3 j h)"),
    "attention.bq": (_LAYER + "attn.c_attn.bias", "(0/3 j g h)"),
    "attention.bk": (_LAYER + "attn.c_attn.bias", "(1/3 j h)"),
    "attention.bv": (_LAYER + "attn.c_attn.bias", "(2/3 j h)"),
    "attention.wo": (_LAYER + "attn.c_proj.weight", "(j g h) d"),
    "attention.bo": (_LAYER + "attn.c_proj.bias", "d"),
    "mlp.w_up": (_LAYER + "mlp.c_fc.weight", "d f"),
    "mlp.b_up": (_LAYER + "mlp.c_fc.bias", "f"),
    "mlp.w_down": (_LAYER + "mlp.c_proj.weight", "f d"),
    "mlp.b_down": (_LAYER + "mlp.c_proj.bias", "d"),
}


def read_config(raw: Raw, names: frozenset[str]) -> ModelConfig:
    """Return our config of GPT-2's."""
    del names
    only(raw, "scale_attn_weights", True)
    only(raw, "scale_attn_by_inverse_layer_idx", False)
    only(raw, "add_cross_attention", False)
    width, heads = size(raw, "n_embd"), size(raw, "n_head")
    return ModelConfig(
        vocab_size=size(raw, "vocab_size"),
        max_seq_len=size(raw, "n_positions"),
        d_model=width,
        d_ff=size(raw, "n_inner", 4 * width),
        num_layers=size(raw, "n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=max(width // heads, 1),
        norm="layernorm",
        norm_eps=read(raw, "layer_norm_epsilon", float, 1e-5),
        position="learned",
        activation=read_gelu(raw, "activation_function", "gelu_new"),
        use_bias=True,
        tie_embeddings=read(raw, "tie_word_embeddings", bool, True),
    )


def write_config(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of config.json for a model of ours."""
    return {
        "vocab_size": model.vocab_size,
        "n_positions": model.max_seq_len,
        "n_embd": model.d_model,
        "n_inner": model.d_ff,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": write_gelu(model),
        "tie_word_embeddings": model.tie_embeddings,
    }


FAMILIES = (
    Family(
        architecture="GPT2LMHeadModel",
        model_type="gpt2",
        prefix="transformer.",
        read=read_config,
        write=write_config,
        outer=OUTER,
        blocks=BLOCKS,
        same={"lm_head.weight": "transformer.wte.weight"},
        # Masks that old files hold.
        ignored=(r".*\.attn\.(bias|masked_bias)",),
    ),
)
