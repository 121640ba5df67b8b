"""What a model computes, whatever it is called, stored as or trained with."""

from __future__ import annotations

import dataclasses
from typing import Any

from uoe_jax.config import ModelConfig


def dense_form(model: ModelConfig) -> ModelConfig:
    """Return the config of the dense model that a union is with all experts on."""
    dense = {
        part: tuple("dense" if kind == "union" else kind for kind in kinds)
        for part, kinds in (("attention", model.attention), ("mlp", model.mlp))
    }
    same = {part: kinds[:1] for part, kinds in dense.items() if len(set(kinds)) == 1}
    return dataclasses.replace(model, **(dense | same))  # pyrefly: ignore


def computes(model: ModelConfig) -> dict[str, Any]:
    """Return what decides on a model's function, by the name of its field."""
    names = ["kind", "max_seq_len", "d_model", "num_layers", "num_heads"]
    names += ["num_kv_heads", "head_dim", "blocks", "norm", "norm_eps", "norm_place"]
    names += ["qk_norm", "position", "activation"]
    found = {name: getattr(model, name) for name in names}
    found["attention"] = tuple(kinds[0] for kinds in model.layer_kinds)
    found["mlp"] = tuple(kinds[1] for kinds in model.layer_kinds)
    found["window"] = model.windows
    found |= {name: "set" for name in model.additions}
    found["attention_bias"] = (model.qkv_bias, model.output_bias)
    found["mlp_bias"] = model.has_mlp_bias
    if "moe" not in model.mlp:
        found["d_ff"] = model.d_ff
    else:
        moe = model.moe
        shape = (moe.num_experts, moe.top_k, model.d_expert)
        found["moe"] = (*shape, moe.router, moe.gate, moe.num_shared)
    if model.rotates:
        found["rope_theta"] = model.rope_theta
        scaling = model.rope_scaling
        found["rope_scaling"] = None if scaling.kind == "none" else scaling
    if model.kind == "vision":
        names = ["image_size", "image_channels", "image_patch", "class_token"]
        found |= {name: getattr(model, name) for name in [*names, "num_classes"]}
    else:
        names = ["vocab_size", "token_types", "embed_norm"]
        found |= {name: getattr(model, name) for name in names}
    if model.kind == "decoder":
        found["tie_embeddings"] = model.tie_embeddings
    else:
        found["pooling"] = model.pooling
    if model.kind == "encoder":
        found["encoder_head"] = model.encoder_head
        if model.encoder_head == "classes":
            found["num_classes"] = model.num_classes
    return found


def differences(model: ModelConfig, other: ModelConfig) -> list[str]:
    """Return where two models compute other things, in words."""
    first, second = computes(model), computes(other)
    return [
        f"{name} is {_short(first.get(name))}, there {_short(second.get(name))}"
        for name in [*first, *(n for n in second if n not in first)]
        if first.get(name) != second.get(name)
    ]


def _short(value: Any) -> str:
    if isinstance(value, tuple) and len(set(value)) == 1:
        value = value[0]
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
