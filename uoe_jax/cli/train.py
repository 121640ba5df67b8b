"""`uoe train`: a preset, any of its fields changed, trained into a run folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from uoe_jax.cli.parse import Experiment, check_typed, parse
from uoe_jax.cli.paths import take_experiment
from uoe_jax.cli.recall import recall_line, remember
from uoe_jax.data.batches import check_targets
from uoe_jax.data.tokenize import check_tokenizer
from uoe_jax.errors import ConfigError, MissingExtra
from uoe_jax.escape import escape_line
from uoe_jax.plan.layouts import read_layout
from uoe_jax.runs.find import RUNS, find_run, with_teacher_found
from uoe_jax.runs.folder import as_recorded, check_settings
from uoe_jax.runs.stored import run_folder
from uoe_jax.stores.mirror import mirror_of
from uoe_jax.validation import validate


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a preset, or go on with a run; the same command again continues.

    `uoe presets` lists PRESETs, `uoe config PRESET` prints one to edit.
    """

    config: Experiment

    layout: Path | None = None  # mesh and choices of a file that uoe plan --out wrote

    run_dir: Path | None = None  # folder of the run; runs/<name> if not given

    init_from: Path | None = None  # the run whose parameters a new run starts with

    init_partial: bool = False  # only those that match in name and shape

    distributed: bool = False  # one process of several, see docs/layouts.md

    resume: bool = True  # continue what the folder holds; otherwise it must be new

    resume_step: int | None = None  # go on from this saved step, not the newest

    report: bool = True  # write the run's page and plots at the end

    recall: bool = True  # say which run below runs/ is most like this one

    quiet: bool = False  # no progress, only errors


def train(args: list[str]) -> int:
    """Train `PRESET [options]`, or go on with a run; once more continues it too."""
    folder, preset, rest = take_experiment(args, "train")
    options = parse(
        TrainOptions,
        rest,
        "train",
        default=TrainOptions(config=preset),
        first="PRESET|RUN|--config FILE",
    )
    config = options.config
    if options.layout is not None:
        config = read_layout(options.layout, config)
    validate(config)
    config = with_teacher_found(config)
    check_typed(rest, config.data, config.model.kind)
    check_targets(config.model)
    check_tokenizer(config.data.tokenizer)
    run_dir = options.run_dir or folder or RUNS / config.name
    if options.init_partial and options.init_from is None:
        raise ConfigError("--init-partial says how to load: give --init-from RUN too")
    source = options.init_from and find_run(str(options.init_from))
    run_dir = run_folder(run_dir, "--run-dir", writes=True)
    config = as_recorded(run_dir, config)
    check_settings(run_dir, config)

    if not options.quiet:
        print("loading jax, looking for devices ...", flush=True)
    from uoe_jax.cli.device import check_devices, prepare

    prepare(joins=options.distributed)
    if options.distributed:
        from uoe_jax.train.peers import join

        join()
        check_devices()
    from uoe_jax.runs.load import ADAPTATION
    from uoe_jax.train import train as run_training
    from uoe_jax.train.initial import recorded_start, start_from

    if (run_dir / ADAPTATION).is_file():
        raise ConfigError(
            f"{run_dir} is the run of an adapter; go on with the same uoe adapt, or "
            "choose another --run-dir"
        )

    if source is None:
        make_subject = recorded_start(run_dir, config)
    else:
        make_subject = start_from(source, config, run_dir, partial=options.init_partial)
    from uoe_jax.train.peers import is_primary

    recalls = options.recall and not options.quiet and is_primary()
    if recalls and (line := recall_line(config, run_dir)):
        print(escape_line(line))
    run_training(
        config,
        run_dir,
        make_subject=make_subject,
        resume=options.resume,
        resume_step=options.resume_step,
        quiet=options.quiet,
    )
    if recalls and mirror_of(run_dir) is None:  # another command has another copy
        remember(run_dir)
    if options.report and is_primary():
        from uoe_jax.cli.runs import write

        if not options.quiet:
            print("drawing the report ...", flush=True)
        try:
            page = write([run_dir])
        except MissingExtra as error:  # the run is there all the same
            print(f"uoe: no report: {error}", file=sys.stderr)
            return 0
        if not options.quiet:
            print(escape_line(f"report: {page}"))
    return 0
