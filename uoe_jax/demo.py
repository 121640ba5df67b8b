"""Dense, mixture and union side by side: same FLOPs a token, same bytes, same steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from uoe_jax.config import (
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    MoeConfig,
    OptimConfig,
    TrainConfig,
    UnionConfig,
    config_hash,
)
from uoe_jax.errors import ConfigError
from uoe_jax.files import format_json, read_json, read_json_lines, write_atomically
from uoe_jax.hardware.count import count_params, flops_per_token
from uoe_jax.validation import parse_config, validate

TOLERANCE = 0.03  # largest difference of active FLOPs a token between two models
PROMPT = "import os\n\n\ndef "
SAMPLE_TOKENS = 104  # with the prompt, about as long as the training examples
PAGE = "report.html"
SUMMARY_KEYS = (
    "name",
    "params",
    "active_flops_per_token",
    "tokens_per_second",
    "train_seconds",
    "val_bits_per_byte",
)


def demo_configs(steps: int | None = None) -> list[ExperimentConfig]:
    """Return the three runs; they differ in their blocks and in nothing else.

    The mixture has 8 MLPs half as wide as the dense one, 2 of them active. The union
    has 8 experts a block, 4 of them active: slices of an MLP more than twice as wide,
    and in the last layer attention heads. (In earlier layers, where little is known
    about a token yet, choosing heads costs more than it gives in so short a run.)
    """
    base = ExperimentConfig(
        name="dense",
        model=ModelConfig(
            vocab_size=256,
            max_seq_len=256,
            d_model=128,
            d_ff=512,
            num_layers=3,
            num_heads=8,
            num_kv_heads=8,
            head_dim=16,
            scan_layers=False,  # three layers compile fast and run faster unrolled
        ),
        data=DataConfig(source="stdlib", batch_size=8, seq_len=128),
        optim=OptimConfig(
            learning_rate=3e-3,
            warmup_steps=20,
            schedule="linear",
            final_lr_fraction=0.05,
            beta2=0.98,
        ),
        train=TrainConfig(
            steps=steps or 500,
            log_every=25,
            eval_every=100,
            eval_batches=48,
            save_every=250,
            keep_checkpoints=1,
        ),
    )
    moe = dataclasses.replace(
        base.model, mlp=("moe",), moe=MoeConfig(num_experts=8, top_k=2)
    )
    union = dataclasses.replace(
        base.model,
        attention=("dense", "dense", "union"),
        mlp=("union",),
        d_ff=1152,  # 2.25 times dense's: half of it is active, and attention costs less
        union=UnionConfig(num_experts=8, top_k=4),
    )
    return [
        base,
        dataclasses.replace(base, name="moe", model=moe),
        dataclasses.replace(base, name="union", model=union),
    ]


def check_budget(configs: Sequence[ExperimentConfig]) -> dict[str, float]:
    """Return active forward FLOPs a token by name; all must be nearly equal.

    Raises ConfigError if two models differ by more than `TOLERANCE`.
    """
    flops = {c.name: flops_per_token(c.model, c.seq_len).forward for c in configs}
    low, high = min(flops.values()), max(flops.values())
    if high > low * (1 + TOLERANCE):
        raise ConfigError(
            f"active FLOPs a token are {flops}; they must agree within "
            f"{TOLERANCE:.0%}, so change a width"
        )
    return flops


def saved_results(
    run_dir: Path, configs: Sequence[ExperimentConfig]
) -> tuple[list[dict[str, Any]], dict[str, str]] | None:
    """Return (rows, samples) of a demo that ran to its end, or None.

    Raises ConfigError if the folder holds runs of other settings.
    """
    if not all([is_finished(run_dir / c.name, c) for c in configs]):
        return None
    try:
        rows = read_json(run_dir / "summary.json")
        samples = read_json(run_dir / "samples.json")
    except (OSError, ValueError):
        return None
    whole = [row["name"] for row in rows] == [c.name for c in configs]
    return (rows, samples) if whole and (run_dir / PAGE).is_file() else None


def is_finished(run_dir: Path, config: ExperimentConfig) -> bool:
    """Return whether a folder holds this very run, trained to its end.

    Raises ConfigError if it holds a run of other settings.
    """
    if not (run_dir / "config.json").is_file():
        return False
    if config_hash(parse_config(run_dir)) != config_hash(config):
        raise ConfigError(
            f"{run_dir} was trained with other settings; delete it or choose another "
            "--run-dir"
        )
    last = _last_step(run_dir / "metrics.jsonl")
    saved = run_dir / "checkpoints" / str(config.train.steps)
    return last == config.train.steps and saved.is_dir()


def _last_step(metrics: Path) -> int:
    """Return the step of the last validation a run recorded, 0 without one."""
    step = 0
    if metrics.is_file():
        for line in read_json_lines(metrics, step=True).records:
            if line["kind"] == "eval":
                step = line["step"]
    return step


def run_demo(
    run_dir: Path,
    configs: Sequence[ExperimentConfig],
    *,
    quiet: bool = False,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Train what isn't trained yet under `run_dir`; return one row a run."""
    from uoe_jax.train import train

    for config in configs:
        validate(config)
    flops = check_budget(configs)
    done = [is_finished(run_dir / c.name, c) for c in configs]
    rows = []
    for config, finished in zip(configs, done, strict=True):
        folder = run_dir / config.name
        if finished:
            say(f"{config.name}: finished run reused from {folder}")
        else:
            say(f"{config.name}: {config.train.steps} steps into {folder}")
            train(config, folder, quiet=quiet)
        rows.append(_row(config, folder, flops[config.name]))
    return rows


def _row(config: ExperimentConfig, folder: Path, flops: float) -> dict[str, Any]:
    from uoe_jax.report.read import read_run

    run = read_run(folder)
    tokens, seconds = run.last("tokens", "train"), run.last("seconds")
    values = (
        config.name,
        sum(count_params(config.model).values()),
        flops,
        (tokens or 0) / (seconds or float("nan")),
        seconds,
        run.last("bits_per_byte"),
    )
    return dict(zip(SUMMARY_KEYS, values, strict=True))


def write_json(path: Path, content: Any) -> None:
    """Write rows or samples as JSON."""
    write_atomically(path, format_json(content, indent=2) + "\n")


def format_summary(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as one aligned table."""
    from uoe_jax.report.table import format_table, si

    header = (
        "name",
        "params",
        "active FLOPs/token",
        "tokens/s",
        "seconds",
        "val bits/byte",
    )
    cells = [
        (
            row["name"],
            f"{row['params']:,}",
            si(row["active_flops_per_token"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['train_seconds']:.1f}",
            f"{row['val_bits_per_byte']:.3f}",
        )
        for row in rows
    ]
    return format_table(header, cells)
