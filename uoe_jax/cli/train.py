"""`uoe train`: a preset, any of its fields changed, trained into a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from uoe_jax.cli.parse import Experiment, parse, take_preset
from uoe_jax.cli.paths import RUNS
from uoe_jax.presets import PRESETS
from uoe_jax.validation import validate


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a preset."""

    config: Experiment

    run_dir: Path | None = None  # folder of the run; runs/<name> if not given

    resume: bool = True  # continue what the folder holds; otherwise it must be new

    resume_step: int | None = None  # go on from this saved step, not the newest

    report: bool = True  # write the run's page and plots at the end

    quiet: bool = False  # no progress, only errors


def train(args: list[str]) -> int:
    """Train `PRESET [options]`; the same command continues an unfinished run."""
    preset, rest = take_preset(args, "train")
    options = parse(
        TrainOptions,
        rest,
        "train",
        default=TrainOptions(config=preset),
        description="Train PRESET (the first argument): " + ", ".join(PRESETS) + ".",
    )
    validate(options.config)
    run_dir = options.run_dir or RUNS / options.config.name

    from uoe_jax.cli.device import prepare

    prepare()
    from uoe_jax.train import train as run_training

    run_training(
        options.config,
        run_dir,
        resume=options.resume,
        resume_step=options.resume_step,
        quiet=options.quiet,
    )
    if options.report:
        from uoe_jax.cli.runs import write

        page = write([run_dir])
        if not options.quiet:
            print(f"report: {page}")
    return 0
