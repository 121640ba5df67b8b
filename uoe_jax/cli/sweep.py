"""`uoe sweep`: one experiment with some settings varied, trained point by point."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from uoe_jax.cli.fields import option_fields
from uoe_jax.cli.parse import Experiment, check_typed, parse
from uoe_jax.cli.paths import take_experiment
from uoe_jax.config import ExperimentConfig, config_hash
from uoe_jax.errors import ConfigError, nearest, shown
from uoe_jax.escape import escape, escape_line
from uoe_jax.fields import Count, Positive, Seed, Whole
from uoe_jax.files import format_json
from uoe_jax.runs.find import RUNS, with_teacher_found
from uoe_jax.runs.grid import Point, make_points, parse_axis, point_name
from uoe_jax.runs.read import read_run
from uoe_jax.runs.sweep import Sweep
from uoe_jax.validation import validate


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Train PRESET once for every combination of the grid's values.

    The same command again goes on: finished points stay, interrupted ones resume.
    """

    config: Experiment
    # NAME=A,B,C of any option of uoe train, or NAME=LOW..HIGH with --samples.
    grid: tuple[str, ...] = ()
    samples: Count | None = None  # points drawn at random; not given: all of the grid
    draw_seed: Seed = 0  # the same one draws the same points
    out: Path | None = None  # folder of the sweep; runs/sweep-<name> if not given
    gpus: tuple[Whole, ...] = ()  # numbers of GPUs, each with a process of its own
    budget_seconds: Positive | None = None  # then what trains is saved, and all ends
    dry_run: bool = False  # list the points, train none
    json: bool = False  # one JSON object of results instead of a table


def sweep(args: list[str]) -> int:
    """Train all points of a sweep and print their table; 1 if one failed."""
    _, preset, rest = take_experiment(args, "sweep")
    default = SweepOptions(config=preset)
    read = lambda more: parse(
        SweepOptions,
        [*rest, *more],
        "sweep",
        default=default,
        first="PRESET|RUN|--config FILE",
    )
    options = read([])
    check_typed(rest, options.config.data, options.config.model.kind)
    points = _points(options)
    configs = _configs(points, read)
    runs = Sweep(
        folder=options.out or RUNS / f"sweep-{options.config.name}",
        configs=configs,
        gpus=options.gpus,
        budget_seconds=options.budget_seconds,
        note=(lambda text: None) if options.json else _say,
    )
    if options.dry_run:
        if options.json:
            print(format_json({"points": list(configs)}, indent=2))
            return 0
        for name in configs:
            print(escape_line(name))
        return 0
    if options.samples is not None and options.samples > len(points):
        runs.note(f"the grid has no more than {len(points):,} points to draw")
    runs.open()
    if not options.json:
        left, folder = len(runs.left()), runs.folder
        _say(f"{left} of {len(configs)} runs to train, into {folder}")
    failed = runs.run()
    rows = _results(runs, dict(zip(configs, points, strict=True)))
    if options.json:
        print(format_json({"runs": rows, "ended": runs.ended}, indent=2))
    else:
        _print(rows, points)
    return 1 if failed else 0


def _configs(
    points: Sequence[Point], read: Callable[[list[str]], SweepOptions]
) -> dict[str, ExperimentConfig]:
    """Return each point's experiment by its name; raise ConfigError for a bad one."""
    configs: dict[str, ExperimentConfig] = {}
    for point in points:
        typed = [word for name, value in point for word in _words(name, value)]
        try:
            config = with_teacher_found(read(typed).config)
            validate(config)
        except ConfigError as error:
            raise ConfigError(f"{point_name(point)}: {error}") from None
        configs[point_name(point)] = config
    if len(configs) < len(points):
        raise ConfigError(
            "two points of the grid have the same name as a folder; choose values that "
            "differ in letters, digits or signs"
        )
    by_hash: dict[str, str] = {}
    for name, config in configs.items():
        twin = by_hash.setdefault(config_hash(config), name)
        if twin != name:
            raise ConfigError(
                f"{twin} and {name} are the same run; name its value once"
            )
    return configs


def _words(name: str, value: str) -> list[str]:
    """Return what a person would type for a value; a flag has none."""
    flags = {f.option: f.off for f in option_fields(ExperimentConfig) if f.off}
    option = f"--{name}"
    if option not in flags:
        return [option, *value.split()]
    if value.lower() not in ("true", "false"):
        raise ConfigError(
            f"--grid {name} has the value {shown(value)}; a flag is true or false"
        )
    return [option if value.lower() == "true" else flags[option]]


def _say(text: str) -> None:
    print(escape_line(text), flush=True)


def _points(options: SweepOptions) -> list[Point]:
    if not options.grid:
        raise ConfigError(
            "a sweep varies something: --grid optim.learning-rate=1e-3,3e-3"
        )
    known = sorted(f.option.lstrip("-") for f in option_fields(ExperimentConfig))
    if twice := sorted({n for n in options.gpus if options.gpus.count(n) > 1}):
        raise ConfigError(f"--gpus names {twice[0]} twice; one process trains on each")
    axes = [parse_axis(text) for text in options.grid]
    for name, _ in axes:
        if name not in known:
            fix = nearest(name, known)
            if not fix.startswith("did"):
                fix = "give an option of uoe train; uoe train --help-all lists them"
            raise ConfigError(f"--grid names {shown(name)}; {fix}")
    return make_points(axes, options.samples, options.draw_seed)


def _results(runs: Sweep, points: dict[str, Point]) -> list[dict]:
    """Return each finished point's values and outcomes, the lowest loss first."""
    rows = []
    for name, point in points.items():
        ended = runs.ended.get(name, {"code": None})["code"] == 0
        record = read_run(runs.folder / name) if ended else None
        if record is None:
            continue
        found = {k: record[k] for k in ("loss", "bits_per_byte", "seconds", "steps")}
        rows.append({"run": str(runs.folder / name), **dict(point), **found})
    return sorted(rows, key=lambda row: (row["loss"] is None, row["loss"] or 0.0))


def _print(rows: list[dict], points: Sequence[Point]) -> None:
    from uoe_jax.report.table import format_table

    if not rows:
        return
    names = [name for name, _ in points[0]]
    short = [name.rpartition(".")[2] for name in names]
    header = [
        s if short.count(s) == 1 else n for s, n in zip(short, names, strict=True)
    ]
    shown = [
        (*(escape(row[n]) for n in names), _number(row["loss"], 4),
         _number(row["bits_per_byte"], 4), _number(row["seconds"], 1))
        for row in rows
    ]  # fmt: skip
    print(format_table((*header, "loss", "bits/byte", "seconds"), shown))
    seeds = "train.seed"
    if seeds in names and len(names) > 1:
        _print_means(rows, [n for n in names if n != seeds])
    if rows[0]["loss"] is not None:
        print(escape_line(f"best: {rows[0]['run']}"))


def _print_means(rows: list[dict], names: list[str]) -> None:
    """Print each setting's mean loss over its seeds, and their deviation."""
    from uoe_jax.report.table import format_table

    groups: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if row["loss"] is not None:
            groups.setdefault(tuple(row[n] for n in names), []).append(row["loss"])
    table = [
        (*map(escape, key), f"{statistics.fmean(losses):.4f}",
         f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "", str(len(losses)))
        for key, losses in sorted(groups.items(), key=lambda g: statistics.fmean(g[1]))
    ]  # fmt: skip
    header = (*(n.rpartition(".")[2] for n in names), "mean loss", "deviation", "seeds")
    print("\n" + format_table(header, table))


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
