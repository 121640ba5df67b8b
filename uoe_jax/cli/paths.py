"""The experiment that a command line begins with: a preset's, a run's or a file's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from uoe_jax.cli.parse import take_preset
from uoe_jax.config import ExperimentConfig
from uoe_jax.presets import PRESETS
from uoe_jax.runs.find import run_or_preset


def take_experiment(
    args: Sequence[str], verb: str
) -> tuple[Path | None, ExperimentConfig, list[str]]:
    """Split `PRESET|RUN|--config FILE [options]`: a run's folder, config, the rest."""
    name = args[0] if args else "-"
    if name.startswith("-") or name in PRESETS:
        return (None, *take_preset(args, verb))
    folder, config = run_or_preset(name)
    return folder, config, list(args[1:])
