"""Which adapter says the most per parameter? Settings of both halves.

Command  python -m experiments.e006_adapters.lm --out OUT, then ...conv --out OUT
Hardware one H100 or H200; about 5 and 1 minutes
Data     $UOE_DATA_DIR/enwiki_plain_66MB.txt.xz, mnist_20k3k.npz, cifar10_jpg_8k2k.npz,
         and the built-in Python source text
Numbers  README.md
"""

from __future__ import annotations

import dataclasses
from typing import Any

from uoe_jax.adapt.config import AdapterConfig
from uoe_jax.config import DataConfig, ExperimentConfig, ModelConfig, TrainConfig

RANKS = (2, 4, 8, 16, 32, 64)
SEEDS = (0, 1, 2)

# Learning rates tried for each method and rank on the first seed.
RATES = {
    "lora": (3e-3, 1e-2, 3e-2),
    "tucker": (3e-3, 1e-2, 3e-2),
    "tucker_heads": (3e-3, 1e-2, 3e-2),
    "full": (3e-4, 1e-3, 3e-3),
}

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "tucker": {"method": "tucker"},
    "tucker_heads": {"method": "tucker", "split_heads": True},
}


def base_experiment(*, tiny: bool = False) -> ExperimentConfig:
    """A dense byte model of 10.6 million parameters (tiny: for a try on a CPU)."""
    width, layers, length = (64, 2, 64) if tiny else (384, 6, 512)
    heads = width // 64 if not tiny else 2
    return ExperimentConfig(
        name="wikipedia-bytes",
        model=ModelConfig(
            vocab_size=256,
            max_seq_len=length,
            d_model=width,
            d_ff=4 * width,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=width // heads,
            compute_dtype="float32" if tiny else "bfloat16",
        ),
        data=DataConfig(
            source="stdlib", batch_size=32, max_bytes=400_000 if tiny else None
        ),
        train=TrainConfig(loss_chunk=16_384),
    )


def adapter(name: str, rank: int) -> AdapterConfig:
    """The adapter of a curve at one rank; scale 2, PEFT's common alpha = 2 r."""
    return AdapterConfig(rank=rank, alpha=2.0 * rank, init="peft", **ADAPTERS[name])


def as_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)
