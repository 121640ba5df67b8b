"""002: ListOps of the Long Range Arena, sequences of up to 2,000 tokens."""

from __future__ import annotations

from typing import Any

from experiments.shared.case import Case, Study, change
from uoe_jax.config import (
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)


def base(tiny: bool) -> ExperimentConfig:
    """Return the arena's usual small encoder: 2 layers of width 64."""
    config = ExperimentConfig(
        name="dense",
        model=ModelConfig(
            kind="encoder",
            vocab_size=32,
            max_seq_len=2048,
            d_model=64,
            d_ff=128,
            num_layers=2,
            num_heads=2,
            num_kv_heads=2,
            head_dim=32,
            position="learned",
            tie_embeddings=False,
            scan_layers=False,
            compute_dtype="bfloat16",
        ),
        data=DataConfig(source="listops", batch_size=32),
        optim=OptimConfig(
            learning_rate=1e-3, warmup_steps=500, weight_decay=0.01, beta2=0.98
        ),
        train=TrainConfig(steps=6000),
    )
    if not tiny:
        return config
    return change(
        config,
        model={"max_seq_len": 128, "d_model": 32, "d_ff": 64, "head_dim": 8},
        data={"num_examples": 800, "min_length": 10, "max_length": 120},
        optim={"warmup_steps": 10},
        train={"steps": 40},
    )


def study(tiny: bool) -> Study:
    """Return the models at two learning rates each; validation picks one of them."""
    dense = base(tiny)
    seeds = (0,) if tiny else (0, 1, 2)
    f = dense.model.d_ff
    half = {"num_experts": 2, "top_k": 1}
    experts = {"union": {"num_experts": 4, "top_k": 2}}
    both = {"attention": ("union",), "mlp": ("union",)}
    models: dict[str, dict[str, Any]] = {
        "dense": {},
        # The published code's numbers: 1 of 2 heads, 2 of 4 experts.
        "SMHA + UoME, half": both | experts | {"union_attention": half},
        "SMHA + UoME": both
        | {"num_heads": 4, "num_kv_heads": 4, "d_ff": 2 * f}
        | {"union": {"num_experts": 4, "top_k": 2}},
        "UoME": {"mlp": ("union",), "d_ff": 2 * f} | experts,
    }
    cases = tuple(
        Case(
            name=f"{name}, rate {rate:g}",
            config=change(dense, model=model, optim={"learning_rate": rate}),
            seeds=seeds,
            group=name,
        )
        for rate in (1e-3, 3e-4)
        for name, model in models.items()
    )
    return Study(
        title="ListOps, T 2048",
        metric="accuracy",
        cases=cases,
        baseline="dense, rate 0.001",
    )
