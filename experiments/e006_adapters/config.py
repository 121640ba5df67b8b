"""006: which adapter says the most per parameter? On a language model, a ConvNet.

Both halves are a program of `python -m experiments.run 006`: their runs start from one
trained model each and share compiled programs, so that they are no `Study`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uoe_jax.adapt.config import AdapterConfig
from uoe_jax.bench.record import read_record
from uoe_jax.config import DataConfig, ExperimentConfig, ModelConfig, TrainConfig
from uoe_jax.files import write_atomically

RANKS = (2, 4, 8, 16, 32, 64)
SEEDS = (0, 1, 2)

# Learning rates tried for each method and rank on the first seed.
RATES = {"adapter": (3e-3, 1e-2, 3e-2), "full": (3e-4, 1e-3, 3e-3)}
CONV_RATES = {"adapter": (1e-3, 3e-3, 1e-2), "full": (3e-4, 1e-3, 3e-3)}

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "tucker": {"method": "tucker"},
    "tucker_heads": {"method": "tucker", "split_heads": True},
}
# Of convolutions: name -> (adapter, ranks).
CONV_ADAPTERS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "lora": ({"method": "lora"}, (1, 2, 4, 8, 16)),
    "tucker_k2": ({"method": "tucker", "kernel_rank": 2}, (2, 4, 8, 16, 32)),
    "tucker_k3": ({"method": "tucker", "kernel_rank": 3}, (2, 4, 8, 16, 32)),
}
FILE = "results.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One half: its curves, and the steps of each run and of the model before it."""

    curves: tuple[str, ...]
    steps: int
    batch: int
    base_steps: int
    base_batch: int
    together: int = 1  # runs side by side, where they can be
    tiny: bool = False


def settings(tiny: bool) -> dict[str, Settings]:
    """Return both halves' settings."""
    if tiny:
        few = {"tiny": True, "base_batch": 8}
        return {
            "lm": Settings(curves=("lora",), steps=6, batch=4, base_steps=20, **few),
            "conv": Settings(
                curves=("head", "lora"), steps=3, batch=8, base_steps=3, **few
            ),
        }
    return {
        "lm": Settings(
            curves=(*ADAPTERS, "full"),
            steps=300,
            batch=32,
            base_steps=6000,
            base_batch=32,
            together=6,
        ),
        "conv": Settings(
            curves=("full", "head", *CONV_ADAPTERS),
            steps=400,
            batch=128,
            base_steps=400,
            base_batch=128,
        ),
    }


def base_experiment(tiny: bool) -> ExperimentConfig:
    """Return a dense byte model of 10.6 million parameters."""
    width, layers, length = (64, 2, 64) if tiny else (384, 6, 512)
    heads = 2 if tiny else width // 64
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
    """Return the adapter of a curve at one rank; scale 2, PEFT's common alpha = 2 r."""
    return AdapterConfig(rank=rank, alpha=2.0 * rank, init="peft", **ADAPTERS[name])


def conv_adapter(name: str, rank: int) -> AdapterConfig:
    """Return the adapter of a curve of convolutions at one rank."""
    how, where = CONV_ADAPTERS[name][0], ("conv*.kernel",)
    return AdapterConfig(rank=rank, alpha=2.0 * rank, targets=where, **how)


def finished(out: Path, tiny: bool) -> bool:
    """Return whether every curve of both halves is there."""
    done = read_record(out / FILE)
    return all(
        curve in done.get(half, {})
        for half, given in settings(tiny).items()
        for curve in given.curves
    )


def program(out: Path, tiny: bool) -> str:
    """Run what is missing of both halves; write results.json and table.md."""
    from experiments.e006_adapters import conv, lm

    for half, given in settings(tiny).items():
        {"lm": lm, "conv": conv}[half].run(out, given)
    return summary(out)


def summary(out: Path) -> str:
    """Write plot.png and table.md of the results that are there; return the table."""
    from experiments.e006_adapters.plot import plot, table

    results = read_record(out / FILE)
    if results:
        write_atomically(out / "plot.png", plot(results))
    write_atomically(out / "table.md", table(results))
    return table(results)
