"""001: language modelling on bytes of Wikipedia; who is best for its FLOPs?"""

from __future__ import annotations

from typing import Any

from experiments.shared.case import Case, Study, change, data_file, search_rates
from uoe_jax.config import (
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from uoe_jax.presets import as_moe, baselines

WIKIPEDIA = "enwiki_plain_66MB.txt.xz"
_SIZE = 66_371_882  # bytes of the text: 60M train, 3M valid, the rest test
RATES = (1e-3, 2e-3, 4e-3)


def base(tiny: bool) -> ExperimentConfig:
    """Return the dense model: 22M parameters, 101M bytes in 1,540 steps."""
    model = ModelConfig(
        vocab_size=256,
        max_seq_len=512,
        d_model=512,
        d_ff=2048,
        num_layers=7,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        scan_layers=False,  # twice as fast as a scan on an H100, compiled in 10 s
        compute_dtype="bfloat16",
    )
    data = DataConfig(
        source="text",
        path=None if tiny else data_file(WIKIPEDIA),
        valid_fraction=3e6 / _SIZE,
        test_fraction=(_SIZE - 63e6) / _SIZE,
        batch_size=128,
    )
    config = ExperimentConfig(
        name="dense",
        model=model,
        data=data,
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=100),
        train=TrainConfig(steps=1540, loss_chunk=65_536),
    )
    return shrink(config) if tiny else config


def shrink(config: ExperimentConfig) -> ExperimentConfig:
    """Return the same kind of experiment for a minute of CPU."""
    return change(
        config,
        model={
            "max_seq_len": 64,
            "d_model": 32,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 8,
            "num_kv_heads": 8,
            "head_dim": 8,
            "scan_layers": True,
            "compute_dtype": "float32",
        },
        data={"source": "stdlib", "path": None, "batch_size": 8, "max_bytes": 1_000_000}
        | {"valid_fraction": 0.05, "test_fraction": 0.05},
        optim={"learning_rate": 3e-3, "warmup_steps": 10},
        train={"steps": 40, "loss_chunk": 512},
    )


def study(tiny: bool) -> Study:
    """Return the models, the most telling first.

    Mixtures and unions cost the dense model's FLOPs but where their name says
    otherwise; `wide` has as many neurons as the mixtures. Expert choice isn't among
    them: it looks ahead, and a causal model refuses it.
    """
    dense = base(tiny)
    seeds = (0,) if tiny else (0, 1, 2)
    f, heads = dense.model.d_ff, dense.model.num_heads
    rivals = baselines(dense)

    def case(
        family: str, name: str, config: ExperimentConfig | None = None, **model: Any
    ) -> Case:
        changed = change(config or dense, model=model)
        return Case(name=name, config=changed, seeds=seeds, family=family)

    def union(name: str, experts: int, top_k: int, times: int, **more: Any) -> Case:
        parts = {"num_experts": experts, "top_k": top_k}
        return case("union", name, mlp=("union",), d_ff=times * f, union=parts, **more)

    more_heads: dict[str, Any] = {"attention": ("union",), "num_heads": 2 * heads}
    more_heads |= {"num_kv_heads": 2 * heads}
    routed = {"num_experts": heads, "top_k": heads // 2, "shared_kv": True}
    queries = {"attention": ("union",), "union_attention": routed}
    mixtures = (
        case("mixture", "MoE 2 of 8", as_moe(dense)),
        case("mixture", "MoE fine-grained + shared", rivals["deepseek"]),
        case("mixture", "MoE Switch", rivals["switch"]),
        case("mixture", "MoE top-2, capacity", rivals["top2"]),
    )
    cases = (
        case("dense", "dense"),
        union("UoME 8 of 32 wide", 32, 8, 4),
        mixtures[0],
        union("UoME 4 of 32 wide lean", 32, 4, 4),
        union("UoME 9 of 128 widest lean", 128, 9, 8),
        union("UoME 9 of 64 wide lean", 64, 9, 4),
        union("UoME 8 of 256 largest lean", 256, 8, 16),
        union("UoME 8 of 16", 16, 8, 2),
        *mixtures[1:],
        union("SMHA 8 of 16 + UoME 8 of 16", 16, 8, 2, **more_heads),
        case("dense", "mixture of depths", rivals["mod"]),
        case("dense", "mixture of heads", rivals["moh"]),
        case("dense", "MoBA", rivals["moba"]),
        union("routed queries + UoME 8 of 16", 16, 8, 2, **queries),
    )
    return Study(
        title="Language modelling, bytes of English Wikipedia",
        metric="bits_per_byte",
        cases=cases,
        rivals=tuple(c.name for c in mixtures),
        search=() if tiny else search_rates(cases, RATES, steps=400),
    )
