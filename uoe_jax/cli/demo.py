"""`uoe demo`: three models of one FLOP budget, trained and compared."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uoe_jax.cli.parse import parse
from uoe_jax.config import ExperimentConfig
from uoe_jax.errors import ConfigError
from uoe_jax.escape import escape
from uoe_jax.runs.find import RUNS


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Train a dense, a mixture and a union model of equal FLOPs on this machine.

    The text is the Python standard library's own source. Ends with a table, a report
    and sampled code. Finished runs are reused, unfinished ones continue.
    """

    run_dir: Path = RUNS / "demo"  # folder of the three runs
    steps: int | None = None  # training steps of each model
    quiet: bool = False  # no training progress


def demo(args: list[str]) -> int:
    """Run the demo; write runs/demo/summary.json and report.html."""
    options = parse(DemoOptions, args, "demo")
    if options.steps is not None and options.steps < 1:
        raise ConfigError(f"--steps is {options.steps}; it must be at least 1")

    from uoe_jax import demo as parts

    configs = parts.demo_configs(options.steps)
    saved = parts.saved_results(options.run_dir, configs)
    if saved is not None:
        print(
            f"Nothing to train: {', '.join(c.name for c in configs)} are finished in "
            f"{options.run_dir} (delete it to train them again)"
        )
        _show(options.run_dir, *saved)
        return 0
    start = time.perf_counter()
    rows, samples = _train_and_sample(options, configs)
    _show(options.run_dir, rows, samples, time.perf_counter() - start)
    return 0


def _train_and_sample(
    options: DemoOptions, configs: Sequence[ExperimentConfig]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Train, sample and write the report; return the table's rows and the samples."""
    import uoe_jax.report.build  # noqa: F401  what the demo ends with, asked for first
    from uoe_jax import api
    from uoe_jax import demo as parts
    from uoe_jax.cli import device
    from uoe_jax.cli.runs import write

    device.prepare()
    print(
        f"Training {', '.join(c.name for c in configs)} with equal FLOPs a token on "
        f"{device.describe()}",
        flush=True,
    )
    rows = parts.run_demo(options.run_dir, configs, quiet=options.quiet)
    print("Sampling, and drawing the report", flush=True)
    folders = [options.run_dir / config.name for config in configs]
    samples = {
        folder.name: api.generate(
            folder,
            parts.PROMPT,
            max_new_tokens=parts.SAMPLE_TOKENS,
            temperature=0.7,
        )
        for folder in folders
    }
    write(
        folders,
        options.run_dir / parts.PAGE,
        samples=samples,
        title="Dense, mixture and union of experts at equal FLOPs",
    )
    parts.write_json(options.run_dir / "samples.json", samples)
    parts.write_json(options.run_dir / "summary.json", rows)
    return rows, samples


def _show(
    run_dir: Path,
    rows: list[dict[str, Any]],
    samples: dict[str, str],
    seconds: float | None = None,
) -> None:
    """Print the table, where the files are and, last, the union's sample."""
    from uoe_jax import demo as parts

    took = "" if seconds is None else f" (the whole took {seconds:.0f} s)"
    print(f"\n{parts.format_summary(rows)}\n")
    print(f"summary: {run_dir / 'summary.json'}")
    print(f"report:  {run_dir / parts.PAGE}{took}\n")
    name, text = list(samples.items())[-1]
    print(f"Sampled by {name}:\n{escape(text)}")
