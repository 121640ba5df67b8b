"""Parameters, FLOPs and bytes of a model, counted from its config. Imports no jax.

One multiply-add is 2 FLOPs. Only matrix products are counted (projections, attention
scores and their weighted sums, MLPs, routers, head), causal attention by the pairs it
keeps. An expert that a token doesn't use isn't counted for that token: a saved FLOP is
counted once, as absent. Norms, softmax and elementwise work are left out, as usual in
model-FLOPs utilisation (MFU).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from uoe_jax.config import ModelConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class FlopCount:
    """FLOPs of one token in a sequence of a given length."""

    parts: dict[str, float]  # forward FLOPs by part of the model

    @property
    def forward(self) -> float:
        """FLOPs of the forward pass, per token."""
        return sum(self.parts.values())

    @property
    def training(self) -> float:
        """FLOPs of forward and backward, per token; recomputation isn't counted."""
        return 3 * self.forward


def num_tokens(model: ModelConfig, seq_len: int | None = None) -> int:
    """Return the sequence length the model works on: patches for vision."""
    if model.kind == "vision":
        return (model.image_size // model.image_patch) ** 2
    return seq_len or model.max_seq_len


def _mlp_matrices(model: ModelConfig) -> int:
    return 3 if model.activation == "swiglu" else 2


def _attention_params(model: ModelConfig) -> int:
    d, h = model.d_model, model.head_dim
    heads, kv = model.num_heads, model.num_kv_heads
    weights = d * h * (heads + 2 * kv) + heads * h * d
    biases = h * (heads + 2 * kv) + d if model.use_bias else 0
    return weights + biases


def _mlp_params(model: ModelConfig, kind: str) -> int:
    d, matrices = model.d_model, _mlp_matrices(model)
    if kind == "moe":
        experts, width = model.moe.num_experts, model.d_expert
        biases = (matrices - 1) * width * experts + d if model.use_bias else 0
        return experts * matrices * d * width + biases
    biases = (matrices - 1) * model.d_ff + d if model.use_bias else 0
    return matrices * d * model.d_ff + biases


def _norm_params(model: ModelConfig) -> int:
    return model.d_model * (2 if model.norm == "layernorm" else 1)


def count_params(model: ModelConfig) -> dict[str, int]:
    """Return trainable parameters by part; their sum is the model's size."""
    d = model.d_model
    parts: Counter[str] = Counter()
    if model.kind == "vision":
        parts["embedding"] = model.image_patch**2 * model.image_channels * d + d
    else:
        parts["embedding"] = model.vocab_size * d
    if model.position == "learned":
        parts["positions"] = num_tokens(model) * d
    for attention, mlp in model.layer_kinds:
        parts["attention"] += _attention_params(model)
        parts["mlp"] += _mlp_params(model, mlp)
        parts["norms"] += 2 * _norm_params(model)
        if attention == "union":
            parts["routers"] += d * model.union.num_experts
        if mlp != "dense":
            experts = model.union if mlp == "union" else model.moe
            parts["routers"] += d * experts.num_experts
    parts["norms"] += _norm_params(model)
    if model.kind != "decoder":
        parts["head"] = d * model.num_classes + model.num_classes
    elif not model.tie_embeddings:
        parts["head"] = d * model.vocab_size
    return dict(parts)


def count_active_params(model: ModelConfig) -> int:
    """Return the parameters one token uses, embeddings and head included."""
    total = sum(count_params(model).values())
    keep = model.union.top_k / model.union.num_experts
    for attention, mlp in model.layer_kinds:
        if attention == "union":
            total -= round(_attention_params(model) * (1 - keep))
        if mlp == "union":
            total -= round(_mlp_params(model, mlp) * (1 - keep))
        if mlp == "moe":
            chosen = model.moe.top_k / model.moe.num_experts
            total -= round(_mlp_params(model, mlp) * (1 - chosen))
    return total


def _attention_flops(model: ModelConfig, kind: str, length: int) -> dict[str, float]:
    d, h = model.d_model, model.head_dim
    heads, kv = model.num_heads, model.num_kv_heads
    keep = 1.0
    parts: dict[str, float] = {}
    if kind == "union":
        keep = model.union.top_k / model.union.num_experts
        parts["routers"] = 2.0 * d * model.union.num_experts
    seen = length * keep  # tokens an expert sees when its load is balanced
    keys = (seen + 1) / 2 if model.causal else seen
    parts["attention projections"] = keep * (2 * d * h * (heads + 2 * kv + heads))
    parts["attention scores"] = keep * 4 * heads * h * keys
    return parts


def _mlp_flops(model: ModelConfig, kind: str) -> dict[str, float]:
    per_neuron = 2 * model.d_model * _mlp_matrices(model)
    if kind == "union":
        union = model.union
        return {
            "mlp": per_neuron * model.d_ff * union.top_k / union.num_experts,
            "routers": 2.0 * model.d_model * union.num_experts,
        }
    if kind == "moe":
        return {
            "mlp": float(per_neuron * model.d_expert * model.moe.top_k),
            "routers": 2.0 * model.d_model * model.moe.num_experts,
        }
    return {"mlp": float(per_neuron * model.d_ff)}


def flops_per_token(model: ModelConfig, seq_len: int | None = None) -> FlopCount:
    """Return one token's FLOPs in a sequence of `seq_len` tokens (or image patches).

    Routed attention is counted at balanced load: every expert sees
    `seq_len * top_k / num_experts` tokens.
    """
    length = num_tokens(model, seq_len)
    parts: dict[str, float] = {}
    for attention, mlp in model.layer_kinds:
        layer = _attention_flops(model, attention, length).items()
        for name, flops in [*layer, *_mlp_flops(model, mlp).items()]:
            parts[name] = parts.get(name, 0.0) + flops
    if model.kind == "decoder":
        parts["head"] = 2.0 * model.d_model * model.vocab_size
    else:
        parts["head"] = 2 * model.d_model * model.num_classes / length
    if model.kind == "vision":
        pixels = model.image_patch**2 * model.image_channels
        parts["embedding"] = 2.0 * pixels * model.d_model
    return FlopCount(parts=parts)


def cache_bytes(
    model: ModelConfig, batch: int, length: int, dtype: str | None = None
) -> int:
    """Return the bytes of keys and values of `batch` sequences of `length` tokens."""
    size = DTYPE_BYTES[dtype or model.compute_dtype]
    total = 0.0
    for attention, _ in model.layer_kinds:
        union = attention == "union"
        keep = model.union.top_k / model.union.num_experts if union else 1.0
        total += 2 * batch * length * model.num_kv_heads * model.head_dim * size * keep
    return round(total)


def state_bytes(model: ModelConfig) -> dict[str, int]:
    """Return bytes of parameters, gradients and AdamW moments, by kind."""
    size = sum(count_params(model).values()) * DTYPE_BYTES[model.param_dtype]
    return {"parameters": size, "gradients": size, "optimizer": 2 * size}


def activation_bytes(model: ModelConfig, batch: int, seq_len: int | None = None) -> int:
    """Estimate the bytes a training step keeps between forward and backward.

    Counts what each layer's products read (layer inputs, queries, keys, values,
    attention outputs, hidden activations); with `remat="full"` only layer inputs stay.
    """
    size, d = DTYPE_BYTES[model.compute_dtype], model.d_model
    tokens = batch * num_tokens(model, seq_len)
    keep = model.union.top_k / model.union.num_experts
    total = 0.0
    for attention, mlp in model.layer_kinds:
        if model.remat == "full":
            total += d
            continue
        heads = 2 * model.num_heads + 2 * model.num_kv_heads
        wide = {
            "dense": float(model.d_ff),
            "union": model.d_ff * keep,
            "moe": float(model.d_expert * model.moe.top_k),
        }[mlp]
        total += 4 * d + heads * model.head_dim * (keep if attention == "union" else 1)
        total += wide * _mlp_matrices(model)
    return round(total * tokens * size)
