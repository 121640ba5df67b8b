"""007: what of 001 shows on two CPU cores: small models, built-in text."""

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
from uoe_jax.presets import as_moe

RATES = (3e-3, 6e-3, 1.2e-2)


def base(tiny: bool) -> ExperimentConfig:
    """Return the dense model: 3 layers of width 64, 0.6M bytes in 300 steps."""
    return ExperimentConfig(
        name="dense",
        model=ModelConfig(
            max_seq_len=128,
            d_model=64,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            num_kv_heads=4,
            head_dim=16,
        ),
        data=DataConfig(
            source="stdlib",
            batch_size=4 if tiny else 16,
            max_bytes=1_000_000 if tiny else 8_000_000,
            valid_fraction=0.02,
            test_fraction=0.02,
        ),
        optim=OptimConfig(learning_rate=6e-3, warmup_steps=40),
        train=TrainConfig(steps=40 if tiny else 300, loss_chunk=2048),
    )


def study(tiny: bool) -> Study:
    """Return dense, a mixture, and a union with as many neurons as the mixture."""
    dense = base(tiny)
    seeds = (0,) if tiny else (0, 1, 2)

    def case(
        family: str, name: str, config: ExperimentConfig | None = None, **model: Any
    ) -> Case:
        changed = change(config or dense, model=model)
        return Case(name=name, config=changed, seeds=seeds, family=family)

    wide: dict[str, Any] = {"mlp": ("union",), "d_ff": 4 * dense.model.d_ff}
    wide |= {"union": {"num_experts": 32, "top_k": 8}}
    cases = (
        case("dense", "dense"),
        case("union", "UoME 8 of 32 wide", **wide),
        case("mixture", "MoE 2 of 8", as_moe(dense)),
    )
    return Study(
        title="Python's own library, bytes; small models on two cores",
        metric="bits_per_byte",
        cases=cases,
        rivals=("MoE 2 of 8",),
        search=() if tiny else search_rates(cases, RATES, steps=100),
    )
