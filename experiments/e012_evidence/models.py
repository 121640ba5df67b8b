"""Sizes, recipe and models of the study, each by the name that tables and plan use.

The recipe is of today for every model: SwiGLU, norms of queries and keys, rotary
positions, heads of 64. Unions and mixtures of the MLP and groups of heads are changes
of the dense model of the same size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.shared.case import change
from uoe_jax.config import (
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from uoe_jax.decompose.cut import Cut
from uoe_jax.decompose.split import union_config
from uoe_jax.errors import ConfigError, nearest

STEP_BYTES = 32_768  # of text a step, whatever T is


@dataclass(frozen=True)
class Size:
    """A dense model's shape, and the rate in the middle of its search."""

    layers: int
    width: int
    rate: float
    head: int = 64

    @property
    def heads(self) -> int:
        """Heads of the dense model."""
        return self.width // self.head


# Unions that spend less than dense; validation chooses among them.
LEAN = (
    "UoME 1 of 8 lean",
    "UoME 1 of 16 lean",
    "UoME 2 of 16 lean",
    "UoME 4 of 32 lean",
)

SIZES = {
    "S": Size(6, 256, 2.8e-3),
    "M": Size(8, 512, 2e-3),
    "L": Size(12, 768, 1.4e-3),
    "XL": Size(16, 1024, 1e-3),
    "R": Size(4, 128, 2.8e-3, head=32),  # of recall
    "tiny": Size(2, 64, 5e-3, head=8),
}


def dense(size: str, length: int, data: DataConfig) -> ExperimentConfig:
    """Return the dense model of a size, for rows of `length` tokens."""
    shape, tiny = SIZES[size], size == "tiny"
    model = ModelConfig(
        vocab_size=256,
        max_seq_len=length,
        d_model=shape.width,
        d_ff=3 * shape.width,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.heads,
        head_dim=shape.head,
        activation="swiglu",
        qk_norm=True,
        scan_layers=tiny,  # unrolled layers train faster and compile longer
        compute_dtype="float32" if tiny else "bfloat16",
    )
    optim = OptimConfig(
        schedule="wsd_sqrt",
        warmup_steps=5 if tiny else 100,
        learning_rate=shape.rate,
        final_lr_fraction=0.0,
    )
    train = TrainConfig(loss_chunk=512 if tiny else STEP_BYTES)
    config = ExperimentConfig(
        name="dense", model=model, data=data, optim=optim, train=train
    )
    rows = 4 if tiny else max(STEP_BYTES // length, 1)
    return change(config, data={"batch_size": rows})


def mlp_models(config: ExperimentConfig) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return (family, changes of the model) of the MLPs, by name.

    A family shares its learning rate: rates don't carry over across granularity.
    `lean` has fewer FLOPs than dense, all others as many: at M and T 1024 60% (experts
    of D/2 and D neurons) or 70% (of 3D/8 and 3D/2).
    """
    f, d = config.model.d_ff, config.model.d_model

    def union(experts: int, top_k: int, width: int, **more: Any) -> dict[str, Any]:
        parts = {"num_experts": experts, "top_k": top_k} | more
        return {"mlp": ("union",), "d_ff": experts * width, "union": parts}

    def mixture(experts: int, top_k: int, **more: Any) -> dict[str, Any]:
        parts = {"num_experts": experts, "top_k": top_k, "d_expert": f // top_k} | more
        return {"mlp": ("moe",), "moe": parts}

    # On average as many experts a token, balanced without a loss.
    roam = {"router": "threshold", "balance_loss": 0.0}
    fine = {"num_shared": 1, "gate": "sigmoid", "balance_loss": 0.0}
    fine |= {"bias_update_rate": 0.001}
    return {
        "dense": ("dense", {}),
        "MoE 2 of 8": ("mixture", mixture(8, 2)),
        "MoE 8 of 32 + shared": ("fine mixture", mixture(32, 8, **fine)),
        "MoE 8 of 64 + shared": ("fine mixture", mixture(64, 8, **fine)),
        "UoME 8 of 32": ("fine union", union(32, 8, f // 8)),
        "UoME 4 of 32 lean": ("fine union", union(32, 4, f // 8)),
        "UoME 1 of 8 lean": ("coarse union", union(8, 1, f // 2)),
        "UoME 1 of 16 lean": ("coarse union", union(16, 1, d)),
        "UoME 2 of 16 lean": ("coarse union", union(16, 2, d // 2)),
        "UoME 8 of 32, thresholds": ("fine union", union(32, 8, f // 8, **roam)),
        "UoME 8 of 32, thresholds, relu": (
            "fine union",
            union(32, 8, f // 8, gate="relu", **roam),
        ),
    }


def attention_models(config: ExperimentConfig) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return (family, changes of the model) of attentions, by name.

    A local head sees a sixteenth of T. `+ conv`: the same causal convolution of 4
    tokens for all. As many heads a token as dense has, but for `2 of 2H`.
    """
    heads = config.model.num_heads
    half, window = heads // 2, max(config.model.max_seq_len // 16, 4)
    conv = {"convolution": 4}

    def local(count: int, **more: Any) -> dict[str, Any]:
        groups = {"local": count, "local_kv": count, "window": window}
        own = heads - count
        return {"head_groups": groups, "num_heads": own, "num_kv_heads": own} | more

    def routed(
        experts: int, top_k: int, beside: int = 0, **more: Any
    ) -> dict[str, Any]:
        union = {"num_experts": experts, "top_k": top_k} | more
        sides = {"num_heads": experts, "num_kv_heads": experts}
        kind = {"attention": ("union",), "union_attention": union}
        return (local(beside) if beside else {}) | sides | kind

    return {
        "dense": ("dense", {}),
        "dense + conv": ("dense", conv),
        "GQA + conv": ("dense", {"num_kv_heads": max(heads // 4, 1)} | conv),
        "local + conv": ("local", local(heads - 1, window=(window,)) | conv),
        "local + full + conv": ("local", local(heads - 1) | conv),
        "local + 2 full + conv": ("local", local(heads - 2) | conv),
        "local + few routed + conv": (
            "routed",
            routed(2 * heads, 2, heads - 2) | conv,
        ),
        "local + few routed, gated values + conv": (
            "routed",
            routed(2 * heads, 2, heads - 2, gated_values=True) | conv,
        ),
        "local + few routed, key router + conv": (
            "routed",
            routed(2 * heads, 2, heads - 2, gated_values=True, key_router=True) | conv,
        ),
        "local + few routed, sink + conv": (
            "routed",
            routed(2 * heads, 2, heads - 2) | conv | {"sink": True},
        ),
        "local + few routed, thresholds + conv": (
            "routed",
            routed(2 * heads, 2, heads - 2, router="threshold") | conv,
        ),
        "local + routed + conv": ("routed", routed(3 * half, half, half) | conv),
        "local + routed": ("routed", routed(3 * half, half, half)),
        "SMHA, gated values + conv": (
            "routed",
            routed(2 * heads, heads, gated_values=True) | conv,
        ),
        "SMHA + conv": ("routed", routed(2 * heads, heads) | conv),
        "SMHA": ("routed", routed(2 * heads, heads)),
    }


def whole_models(config: ExperimentConfig) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return (family, changes) of models whose attention and MLP both are changed."""
    mlps, heads = mlp_models(config), attention_models(config)

    def both(mlp: str, attention: str) -> dict[str, Any]:
        return mlps[mlp][1] | heads[attention][1]

    return {
        "dense + conv": heads["dense + conv"],
        "MoE 2 of 8 + conv": ("mixture", both("MoE 2 of 8", "dense + conv")),
        "MoE 2 of 8, local + full": (
            "mixture",
            both("MoE 2 of 8", "local + full + conv"),
        ),
        "UoME 8 of 32, local + few routed": (
            "fine union",
            both("UoME 8 of 32", "local + few routed + conv"),
        ),
        **{f"{n} + conv": (mlps[n][0], both(n, "dense + conv")) for n in LEAN},
        **{
            f"{n}, local + full": (mlps[n][0], both(n, "local + full + conv"))
            for n in LEAN
        },
    }


CUT = Cut(
    num_experts=16,
    top_k=8,
    shared=4,
    parts=("mlp",),
    grouping="coactivation",
    refit=True,
)


def cut_models(config: ExperimentConfig) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return (family, changes) of a dense model and of what trains on from its end.

    With half of the MLP on a model has 70% of dense's FLOPs at M and T 1024.
    """
    half = union_config(
        config.model, CUT.experts, CUT.chosen, CUT.parts, shared=CUT.shared
    )
    changed = ("mlp", "union", "union_attention")
    return {
        "dense": ("dense", {}),
        "dense, trained on": ("dense", {}),
        "dense, 8 of 16 on": ("dense", {n: getattr(half, n) for n in changed}),
    }


BUDGETS = (2, 4, 8, 16)  # experts of 32 that a token uses


def budget_models(config: ExperimentConfig) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return (family, changes) of a union for each budget, and of one for all.

    8 of 32 have as many FLOPs as dense.
    """
    width = config.model.d_ff // 8

    def union(top_k: int, **more: Any) -> tuple[str, dict[str, Any]]:
        parts = {"num_experts": 32, "top_k": top_k} | more
        changes = {"mlp": ("union",), "d_ff": 32 * width, "union": parts}
        return "fine union", changes

    fixed = {f"UoME {top_k} of 32": union(top_k) for top_k in BUDGETS}
    low, high = BUDGETS[0], BUDGETS[-1]
    drawn = union(high, least_top_k=low)
    return fixed | {f"UoME {low} to {high} of 32": drawn}


MODELS = {
    "mlp": mlp_models,
    "attention": attention_models,
    "whole": whole_models,
    "budgets": budget_models,
    "cut": cut_models,
}


def make(config: ExperimentConfig, kind: str, name: str) -> tuple[str, Any]:
    """Return a named model's family and its config; ConfigError for unknown names."""
    known = MODELS[kind](config)
    if name not in known:
        raise ConfigError(f"no model {name!r} of {kind}; {nearest(name, known)}")
    family, changes = known[name]
    return family, change(config, model=changes)
