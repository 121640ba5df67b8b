"""Llama, Mistral, Qwen2, Qwen3 and Mixtral: one shape of decoder with small changes."""

from __future__ import annotations

import functools
from typing import Any, Literal

from uoe_jax.config import ModelConfig, MoeConfig, RopeScaling
from uoe_jax.errors import DataError, shown
from uoe_jax.interop.families.fields import Raw, only, read, size
from uoe_jax.interop.names import Family, Table

OUTER: Table = {
    "embed.embedding": ("model.embed_tokens.weight", "v d"),
    "trunk.norm.scale": ("model.norm.weight", "d"),
    "head.weight": ("lm_head.weight", "v d"),
}
_LAYER = "model.layers.{layer}."
BLOCKS: Table = {
    "attention_norm.scale": (_LAYER + "input_layernorm.weight", "d"),
    "mlp_norm.scale": (_LAYER + "post_attention_layernorm.weight", "d"),
    "attention.wq": (_LAYER + "self_attn.q_proj.weight", "(j g h) d"),
    "attention.wk": (_LAYER + "self_attn.k_proj.weight", "(j h) d"),
    "attention.wv": (_LAYER + "self_attn.v_proj.weight", "(j h) d"),
    "attention.wo": (_LAYER + "self_attn.o_proj.weight", "d (j g h)"),
    "attention.bq": (_LAYER + "self_attn.q_proj.bias", "(j g h)"),
    "attention.bk": (_LAYER + "self_attn.k_proj.bias", "(j h)"),
    "attention.bv": (_LAYER + "self_attn.v_proj.bias", "(j h)"),
    "attention.bo": (_LAYER + "self_attn.o_proj.bias", "d"),
    "attention.q_norm.scale": (_LAYER + "self_attn.q_norm.weight", "h"),
    "attention.k_norm.scale": (_LAYER + "self_attn.k_norm.weight", "h"),
    "mlp.w_gate": (_LAYER + "mlp.gate_proj.weight", "f d"),
    "mlp.w_up": (_LAYER + "mlp.up_proj.weight", "f d"),
    "mlp.w_down": (_LAYER + "mlp.down_proj.weight", "d f"),
    "mlp.b_gate": (_LAYER + "mlp.gate_proj.bias", "f"),
    "mlp.b_up": (_LAYER + "mlp.up_proj.bias", "f"),
    "mlp.b_down": (_LAYER + "mlp.down_proj.bias", "d"),
}
_MOE = _LAYER + "block_sparse_moe."
MIXTRAL_BLOCKS: Table = {
    **{name: entry for name, entry in BLOCKS.items() if not name.startswith("mlp.")},
    "mlp.router.weight": (_MOE + "gate.weight", "x d"),
    "mlp.w_gate": (_MOE + "experts.{expert}.w1.weight", "f d"),
    "mlp.w_up": (_MOE + "experts.{expert}.w3.weight", "f d"),
    "mlp.w_down": (_MOE + "experts.{expert}.w2.weight", "d f"),
}
# Frequencies of the rotation, which old files hold; they follow from the config.
IGNORED = (r".*\.rotary_emb\.inv_freq",)


def read_config(kind: str, raw: Raw, names: frozenset[str]) -> ModelConfig:
    """Return our config of a config.json of this model_type."""
    del names
    only(raw, "hidden_act", "silu", "swish")
    only(raw, "pretraining_tp", 1)
    width, heads = size(raw, "hidden_size"), size(raw, "num_attention_heads")
    kv_heads, layers = size(raw, "num_key_value_heads", heads), _layers(raw)
    inner = size(raw, "intermediate_size")
    biased = bool(raw.get("attention_bias", False))
    bias: Literal["none", "qkv", "all"] = "all" if biased else "none"
    theta, scaling = read_rope(raw)
    mixture: dict[str, Any] = {}
    if kind == "mixtral":
        experts = MoeConfig(
            num_experts=size(raw, "num_local_experts", 8),
            top_k=size(raw, "num_experts_per_tok", 2),
            d_expert=inner,
        )
        mixture = {"mlp": ("moe",), "moe": experts}
    return ModelConfig(
        vocab_size=size(raw, "vocab_size"),
        max_seq_len=size(raw, "max_position_embeddings"),
        d_model=width,
        d_ff=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size(raw, "head_dim", max(width // heads, 1)),
        norm_eps=read(raw, "rms_norm_eps", float, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        window=_windows(kind, raw, layers),
        activation="swiglu",
        attention_bias="qkv" if kind == "qwen2" else bias,
        mlp_bias=kind == "llama" and read(raw, "mlp_bias", bool, False),
        qk_norm=kind == "qwen3",
        tie_embeddings=read(raw, "tie_word_embeddings", bool, False),
        **mixture,
    )


def _layers(raw: Raw) -> int:
    return size(raw, "num_hidden_layers")


def read_rope(raw: Raw) -> tuple[float, RopeScaling]:
    """Return theta and scaling, as transformers 5 or 4 wrote them.

    Raises DataError for a scaling that isn't read.
    """
    both = raw.get("rope_parameters") or {}
    scaled = both or raw.get("rope_scaling") or {}
    if not isinstance(both, dict) or not isinstance(scaled, dict):
        raise DataError(
            f"config.json: rope_parameters is {shown(both or scaled)}; it must be an "
            "object of one rotation"
        )
    theta = read({**raw, **both}, "rope_theta", float, 10_000.0)
    if any(share != 1 for share in (both.get("partial_rotary_factor", 1),)):
        raise DataError("config.json: partial_rotary_factor isn't 1; all is rotated")
    kind = scaled.get("rope_type", scaled.get("type", "default"))
    if kind == "default":
        return theta, RopeScaling()
    if kind not in ("linear", "llama3"):
        raise DataError(
            f"config.json: rope_type is {shown(kind)}; read are default, linear, llama3"
        )
    factor = read(scaled, "factor", float)
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=factor)
    return theta, RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=read(scaled, "low_freq_factor", float),
        high_freq_factor=read(scaled, "high_freq_factor", float),
        original_max_seq_len=size(scaled, "original_max_position_embeddings"),
    )


def _windows(kind: str, raw: Raw, layers: int) -> tuple[int, ...]:
    """Return the window of every layer, 0 for none, shortened to one where equal."""
    if kind == "llama" or raw.get("sliding_window") is None:
        return (0,)
    window = size(raw, "sliding_window")
    if kind in ("mistral", "mixtral"):
        return (window,)
    if not raw.get("use_sliding_window"):
        return (0,)
    first = read(raw, "max_window_layers", int, 28)
    usual = ["sliding_attention" if n >= first else "" for n in range(layers)]
    types = read(raw, "layer_types", list, usual)
    if len(types) != layers:
        raise DataError(
            f"config.json: layer_types has {len(types)} of {layers} layers; name all"
        )
    windows = tuple(window if t == "sliding_attention" else 0 for t in types)
    return windows[:1] if len(set(windows)) == 1 else windows


def write_config(kind: str, model: ModelConfig) -> dict[str, Any]:
    """Return the fields of config.json for a model of ours."""
    raw: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_seq_len,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        **write_rope(model),
    }
    if kind in ("llama", "qwen3"):
        raw["attention_bias"] = model.output_bias
    if kind == "llama":
        raw["mlp_bias"] = model.has_mlp_bias
    if kind == "mixtral":
        raw["intermediate_size"] = model.d_expert
        raw["num_local_experts"] = model.moe.num_experts
        raw["num_experts_per_tok"] = model.moe.top_k
    if kind == "llama":
        return raw
    window = max(model.window)
    raw["sliding_window"] = window or None
    if kind.startswith("qwen"):
        raw["use_sliding_window"] = bool(window)
        raw["layer_types"] = [
            "sliding_attention" if w else "full_attention" for w in model.windows
        ]
    return raw


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of the rotation, for transformers 5 and 4."""
    scaling, theta = model.rope_scaling, model.rope_theta
    kind = "default" if scaling.kind == "none" else scaling.kind
    what: dict[str, Any] = {"rope_type": kind}
    if kind != "default":
        what["factor"] = scaling.factor
    if kind == "llama3":
        what |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    return {
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else what,
        "rope_parameters": {**what, "rope_theta": theta},
    }


FAMILIES = tuple(
    Family(
        architecture=architecture,
        model_type=kind,
        prefix="model.",
        read=functools.partial(read_config, kind),
        write=functools.partial(write_config, kind),
        outer=OUTER,
        blocks=MIXTRAL_BLOCKS if kind == "mixtral" else BLOCKS,
        ignored=IGNORED,
        same={"lm_head.weight": "model.embed_tokens.weight"},
    )
    for architecture, kind in (
        ("LlamaForCausalLM", "llama"),
        ("Qwen2ForCausalLM", "qwen2"),
        ("Qwen3ForCausalLM", "qwen3"),
        ("MistralForCausalLM", "mistral"),
        ("MixtralForCausalLM", "mixtral"),
    )
)
