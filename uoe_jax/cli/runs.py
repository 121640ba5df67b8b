"""`uoe eval`, `uoe report`: verbs that read finished runs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from uoe_jax.cli.notes import tell_loading
from uoe_jax.cli.parse import check_typed, parse, typed_data
from uoe_jax.config import DataConfig, Share
from uoe_jax.errors import ConfigError, DataError
from uoe_jax.escape import escape, escape_line
from uoe_jax.files import format_json
from uoe_jax.runs.find import find_run
from uoe_jax.validation import read_config, validate


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Evaluate a run on one split, once through."""

    run: Positional[Annotated[str, arg(metavar="RUN")]] = ""  # or runs/RUN
    data: DataConfig = field(default_factory=DataConfig)  # given: other data
    split: Literal["train", "valid", "test"] = "valid"  # of the data
    checkpoint: Literal["last", "best"] = "last"  # of the run
    max_batches: int | None = None  # only the first batches of the split
    cut: Share | None = None  # open a run of compress --anytime without this share
    json: bool = False  # one JSON object instead of tables


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write plots and a self-contained page for one run, or several side by side."""

    runs: Positional[Annotated[tuple[str, ...], arg(metavar="RUN...")]]
    # The page, and the folder that its pictures go below. Not given: RUN/report.html,
    # or compare-NAMES.html beside the first of several. Given, runs can be read-only.
    out: Path | None = None
    overlay: bool = True  # load the models and show their routing of real text


def evaluate(args: list[str]) -> int:
    """Print loss, perplexity, bits per byte, accuracy and router statistics."""
    options, folder = _eval_options(args)
    tell_loading(folder)

    from uoe_jax.cli.device import prepare

    prepare()
    from uoe_jax.compress.anytime import open_run
    from uoe_jax.compress.products import with_fast_products
    from uoe_jax.evaluate import evaluate as run_evaluation
    from uoe_jax.hardware.count import num_tokens
    from uoe_jax.report.read import routed_layers
    from uoe_jax.report.table import format_table
    from uoe_jax.runs.load import run_dataset

    run = open_run(folder, which=options.checkpoint, cut=options.cut)
    tokens = run.config.data.batch_size * num_tokens(
        run.config.model, run.config.seq_len
    )
    run = with_fast_products(run, tokens)
    dataset = run_dataset(folder, run.config, options.split, options.data)
    found: dict[str, Any] = {
        "step": run.step,
        "split": options.split,
        "data": dataset.info["source"],
    }
    if dataset.lost_share:  # bits per byte are over the rest
        found["share_lost"] = dataset.lost_share
    found |= run_evaluation(
        run.model, dataset.config, max_batches=options.max_batches, dataset=dataset
    )
    if options.json:
        print(format_json(found, indent=2))
        return 0
    width = max(map(len, found))
    for key, value in found.items():
        if isinstance(value, (int, float, str)):
            shown = f"{value:.4f}" if isinstance(value, float) else str(value)
            print(f"{key.replace('_', ' '):<{width}}  {escape(shown)}")
    rows = [
        (block, layer, *_spread(stats, row))
        for block, stats in found["router"].items()
        for row, layer in enumerate(routed_layers(run.config.model, block))
    ]
    if rows:
        header = ("router", "layer", "entropy (nats)", "least load", "most load")
        print("\n" + format_table(header, rows))
        print("load: an expert's share of the picks; 1 is balanced")
    return 0


def _eval_options(args: list[str]) -> tuple[EvalOptions, Path]:
    """Return options whose data is the run's, but for what is typed; and the run."""
    folder = find_run(parse(EvalOptions, args, "eval").run)
    config = read_config(folder)
    # Once more, as what isn't typed is the run's.
    options = parse(EvalOptions, args, "eval", default=EvalOptions(data=config.data))
    most = options.max_batches
    if most is not None and most < 1:
        raise ConfigError(f"--max-batches is {most}; it must be at least 1")
    validate(dataclasses.replace(config, data=options.data))
    typed = typed_data(args)
    if typed & {"path", "mix", "source"}:  # of which the run's may not be options
        from uoe_jax.data.source import without_unread

        data = without_unread(options.data, config.model.kind, typed)
        options = dataclasses.replace(options, data=data)
    check_typed(args, options.data, config.model.kind)
    return options, folder


def _spread(stats: dict, row: int) -> list[str]:
    """Return a routed layer's entropy and its lightest and heaviest expert."""
    load = stats["load"][row]
    shares = [share * len(load) for share in load]
    return [f"{x:.3f}" for x in (stats["entropy"][row], min(shares), max(shares))]


def report(args: list[str]) -> int:
    """Write a page over one run or several."""
    options = parse(ReportOptions, args, "report")
    if not options.runs:
        raise ConfigError("uoe report takes at least one run: uoe report RUN...")
    folders = [find_run(run) for run in options.runs]
    tell_loading(", ".join(map(str, folders)))
    page = write(folders, options.out, overlay=options.overlay)
    print(escape_line(f"report: {page}"))
    return 0


def write(
    folders: Sequence[Path],
    out: Path | None = None,
    *,
    overlay: bool = True,
    samples: dict[str, str] | None = None,
    title: str | None = None,
) -> Path:
    """Write the page of some runs, with their routing of a real example."""
    from uoe_jax.report.build import write_report

    overlays = {}
    if overlay:
        from uoe_jax.cli.device import prepare

        prepare()
        from uoe_jax.report.collect import collect_overlay
        from uoe_jax.runs.load import ADAPTATION, load_run, run_dataset

        for folder in folders:
            if (folder / ADAPTATION).is_file():  # no whole model: its curves alone
                continue
            run = load_run(folder)
            try:
                dataset = run_dataset(folder, run.config, "valid")
            except DataError as error:  # the rest of the page needs no data
                print(f"uoe: no routing of real text: {escape(str(error))}",
                      file=sys.stderr)  # fmt: skip
                continue
            found = collect_overlay(run.model, run.config, dataset)
            if found is not None:
                overlays[folder] = found
    return write_report(folders, out, overlays=overlays, samples=samples, title=title)
