"""`uoe demo`: three models of one FLOP budget, trained and compared."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from uoe_jax.cli.parse import parse
from uoe_jax.cli.paths import RUNS
from uoe_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Train a dense, a mixture and a union model of equal FLOPs on this machine.

    The text is the Python standard library's own source. Ends with a table, a report
    and sampled code. Finished runs are reused, unfinished ones continue.
    """

    run_dir: Path = RUNS / "demo"
    steps: int | None = None  # training steps of each model
    quiet: bool = False  # no training progress


def demo(args: list[str]) -> int:
    """Run the demo; write runs/demo/summary.json and report.html."""
    options = parse(DemoOptions, args, "demo")
    if options.steps is not None and options.steps < 1:
        raise ConfigError(f"--steps is {options.steps}; it must be at least 1")

    from uoe_jax import demo as parts
    from uoe_jax.cli import device
    from uoe_jax.cli.runs import GenerateOptions, continue_text, write

    device.prepare()
    start = time.perf_counter()
    configs = parts.demo_configs(options.steps)
    print(
        f"Training {', '.join(c.name for c in configs)} with equal FLOPs a token on "
        f"{device.describe()}",
        flush=True,
    )
    rows = parts.run_demo(options.run_dir, configs, quiet=options.quiet)
    parts.write_summary(options.run_dir / "summary.json", rows)
    folders = [options.run_dir / config.name for config in configs]
    samples = {
        folder.name: continue_text(
            folder,
            GenerateOptions(
                run=str(folder), prompt=parts.PROMPT, max_new_tokens=parts.SAMPLE_TOKENS
            ),
        )
        for folder in folders
    }
    page = write(
        folders,
        options.run_dir / "report.html",
        samples=samples,
        title="Dense, mixture and union of experts at equal FLOPs",
    )
    print(f"\n{parts.format_summary(rows)}\n")
    print(f"summary: {options.run_dir / 'summary.json'}")
    print(f"report:  {page}")
    print(f"took {time.perf_counter() - start:.0f} s\n")
    name, text = list(samples.items())[-1]
    print(f"Sampled by {name}:\n{text}")
    return 0
