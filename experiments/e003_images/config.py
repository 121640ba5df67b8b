"""003: CIFAR-10 images, a union beside dense and MoE at equal FLOPs."""

from __future__ import annotations

from typing import Any

from experiments.e003_images import data
from experiments.shared.case import Case, Study, change, data_file, search_rates
from uoe_jax.config import (
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from uoe_jax.presets import as_expert_choice, as_moe, baselines

CIFAR = "cifar10_jpg_8k2k.npz"
RATES = (5e-4, 1e-3, 2e-3)


def base(tiny: bool) -> ExperimentConfig:
    """Return the dense vision transformer: 64 patches of 4x4 pixels, width 192."""
    config = ExperimentConfig(
        name="dense",
        model=ModelConfig(
            kind="vision",
            max_seq_len=64,
            d_model=192,
            d_ff=768,
            num_layers=6,
            num_heads=3,
            num_kv_heads=3,
            head_dim=64,
            position="learned",
            tie_embeddings=False,
            dropout=0.1,
            image_size=32,
            image_channels=3,
            image_patch=4,
            scan_layers=False,
            compute_dtype="bfloat16",
        ),
        data=DataConfig(
            source="digits" if tiny else "npz",
            path=None if tiny else data.plain_copy(data_file(CIFAR)),
            valid_fraction=0.1,
            test_fraction=0.1,
            batch_size=256,
        ),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=100, weight_decay=0.3),
        train=TrainConfig(steps=1200, label_smoothing=0.1),
    )
    if not tiny:
        return config
    small = {"image_size": 8, "image_channels": 1, "image_patch": 2, "max_seq_len": 16}
    return change(
        config,
        model=small | {"d_model": 32, "d_ff": 64, "num_layers": 2, "head_dim": 8},
        data={"batch_size": 32},
        optim={"warmup_steps": 10},
        train={"steps": 100},
    )


def study(tiny: bool) -> Study:
    """Return dense, mixtures and unions, of the dense model's FLOPs if not named."""
    dense = base(tiny)
    seeds = (0,) if tiny else (0, 1, 2)
    f, heads = dense.model.d_ff, dense.model.num_heads

    def case(
        family: str, name: str, config: ExperimentConfig | None = None, **model: Any
    ) -> Case:
        changed = change(config or dense, model=model)
        return Case(name=name, config=changed, seeds=seeds, family=family)

    half = {"num_experts": 8, "top_k": 4}
    wide: dict[str, Any] = {"mlp": ("union",), "d_ff": 2 * f}
    more_heads: dict[str, Any] = {"attention": ("union",), "num_heads": 2 * heads}
    more_heads |= {"num_kv_heads": 2 * heads}
    own = {"num_experts": 2 * heads, "top_k": heads}

    def uome(name: str, **more: Any) -> Case:
        return case("union", name, **wide, union=half | more)

    mixtures = (
        case("mixture", "MoE 2 of 8", as_moe(dense)),
        case("mixture", "MoE expert choice", as_expert_choice(dense)),
        case("mixture", "MoE fine-grained + shared", baselines(dense)["deepseek"]),
    )
    cases = (
        case("dense", "dense"),
        uome("UoME 4 of 8"),
        mixtures[0],
        case("union", "SMHA 3 of 6 + UoME 4 of 8", **wide, **more_heads, union=half,
             union_attention=own),
        *mixtures[1:],
        case("union", "UoME 8 of 32 wide", mlp=("union",), d_ff=4 * f,
             union={"num_experts": 32, "top_k": 8}),
        uome("UoME, patches of 4", patch_size=4),
        uome("UoME, expert selection", router="selection"),
        case("union", "UoME 4 of 8 half", mlp=("union",), union=half),
    )  # fmt: skip
    return Study(
        title="CIFAR-10 from 8,000 images",
        metric="accuracy",
        cases=cases,
        rivals=tuple(c.name for c in mixtures),
        search=() if tiny else search_rates(cases, RATES, steps=400),
    )
