"""002: ListOps of the Long Range Arena, sequences of up to 2,000 tokens."""

from __future__ import annotations

from typing import Any

from experiments.shared.case import Case, Study, change, search_rates
from uoe_jax.config import (
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)

RATES = (3e-4, 1e-3, 3e-3)


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
        train=TrainConfig(steps=5000),
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
    """Return the models, the published code's union after the dense one."""
    dense = base(tiny)
    seeds = (0,) if tiny else (0, 1, 2)
    f, heads = dense.model.d_ff, dense.model.num_heads
    experts = {"union": {"num_experts": 4, "top_k": 2}}
    both = {"attention": ("union",), "mlp": ("union",)} | experts
    own = {"union_attention": {"num_experts": heads, "top_k": heads // 2}}
    more_heads = {"num_heads": 2 * heads, "num_kv_heads": 2 * heads}

    def case(family: str, name: str, **model: Any) -> Case:
        config = change(dense, model=model)
        return Case(name=name, config=config, seeds=seeds, family=family)

    cases = (
        case("dense", "dense"),
        # The published code's numbers: 1 of 2 heads, 2 of 4 experts.
        case("union", "SMHA 1 of 2 + UoME 2 of 4", **both, **own),
        case("union", "SMHA 2 of 4 + UoME 2 of 4", **both, **more_heads, d_ff=2 * f),
        case("union", "UoME 2 of 4", mlp=("union",), d_ff=2 * f, **experts),
    )
    return Study(
        title="ListOps, T 2048",
        metric="accuracy",
        cases=cases,
        search=() if tiny else search_rates(cases, RATES, steps=1500),
    )
