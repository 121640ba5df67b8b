"""`uoe adapt`: a run adapted to other data by a few factors; the run stays as it is."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from uoe_jax.adapt.config import AdapterConfig, check_adapter
from uoe_jax.adapt.request import Adaptation, AdaptRequest
from uoe_jax.cli.fields import option_fields, part_of, typed_options
from uoe_jax.cli.parse import parse
from uoe_jax.config import MeshConfig
from uoe_jax.errors import ConfigError
from uoe_jax.escape import escape, escape_line
from uoe_jax.files import format_json
from uoe_jax.runs.find import RUNS, find_run
from uoe_jax.runs.stored import run_folder
from uoe_jax.validation import read_config


@dataclass(frozen=True, kw_only=True)
class AdaptOptions(Adaptation, AdapterConfig):
    """Adapt a run to other data with Tucker or LoRA factors, beside its weights."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]  # its folder, or a name in runs

    # Devices by axis; as many as divide a pass over data if nothing is given.
    mesh: MeshConfig = field(default_factory=MeshConfig)

    out: Path | None = None  # new folder; runs/<name>-<method><rank> if not given

    json: bool = False  # one JSON object instead of tables

    quiet: bool = False  # no progress


SHAPE = {f.name for f in fields(AdapterConfig)}  # what a loaded adapter brings with it
TRAINING = {"learning_rate", "seed"}  # what only training asks for


def adapt(args: list[str]) -> int:
    """Train an adapter of a run; print its parameters, memory, speed and gain."""
    options = parse(AdaptOptions, args, "adapt")
    folder = find_run(options.run)
    typed = typed_options(args, AdaptOptions)
    check_load(options, typed)
    adapter = None
    if options.load is None:
        adapter = part_of(options, AdapterConfig)
        check_adapter(adapter)
    mesh = options.mesh if any(n.startswith("--mesh.") for n in typed) else None
    request = part_of(options, Adaptation, AdaptRequest, adapter=adapter, mesh=mesh)
    name = f"{read_config(folder).name}-{options.method}{options.rank}"
    out = run_folder(options.out or RUNS / name, "--out", writes=True)

    from uoe_jax.cli.device import prepare

    prepare()
    from uoe_jax.adapt.run import adapt_run

    quiet = options.quiet or options.json
    report = adapt_run(folder, out, request, quiet=quiet)
    if options.json:
        print(format_json(report, indent=2))
    else:
        print(escape(describe(report)))
        print(escape_line(f"adapter: {out}"))
    return 0


def check_load(options: AdaptOptions, typed: set[str]) -> None:
    """Raise ConfigError for typed options that have nothing to decide.

    A loaded adapter settles its own shape; without steps nothing is trained.
    """
    if options.load is None:
        return
    for option in option_fields(AdaptOptions):
        if option.option not in typed:
            continue
        shown = f"{option.option} is {getattr(options, option.path[0])!r}"
        if option.name in SHAPE:
            raise ConfigError(
                f"{shown} with --load; a loaded adapter keeps its own: leave one of "
                "them out"
            )
        if option.name in TRAINING and options.steps == 0:
            raise ConfigError(
                f"{shown} with --steps 0; nothing is trained: leave it out or take "
                "steps"
            )
    if options.out is None:
        raise ConfigError(
            f"--load {options.load} without --out; say which new folder the result "
            "goes to"
        )


def describe(report: dict[str, Any]) -> str:
    """Return a report as tables."""
    from uoe_jax.report.table import format_table, si

    params = report["params"]
    share = params["adapter"] / params["base"]
    rows = [
        ("base parameters", si(params["base"])),
        ("adapter parameters", f"{si(params['adapter'])} ({share:.2%})"),
        ("file", f"{si(report['file_bytes'])}B"),
    ]
    if "steps" in report:
        memory = report["memory_bytes"]
        trained = memory["adapter"] + memory["optimizer"]
        rows += [
            ("frozen base", f"{si(memory['frozen_base'])}B"),
            ("adapter and optimizer", f"{si(trained)}B"),
            ("speed", f"{si(report['tokens_per_second'])} tokens/s"),
            ("time", _took(report)),
        ]  # fmt: skip
        if report["skipped_steps"]:
            rows.append(("steps skipped, not finite", str(report["skipped_steps"])))
    keys = ("loss", "bits_per_byte", "accuracy")
    scores = [
        (when, *(_number(report[when][key]) for key in keys))
        for when in ("before", "after")
        if when in report
    ]
    text = format_table(("adapter", f"{report['method']} {report['rank']}"), rows)
    header = ("validation", "loss", "bits/byte", "accuracy")
    text += "\n\n" + format_table(header, scores)
    if "merged" in report:
        text += f"\n\nmerged run: {report['merged']}"
        for dtype, share in report["merged_kept"].items():
            text += f"\n{share:.1%} of the deltas survives in {dtype} weights"
    return text


def _took(report: dict[str, Any]) -> str:
    text, compiling = f"{report['seconds']:.1f} s", report["compile_seconds"]
    return text if compiling is None else f"{text}, compiled in {compiling:.1f} s"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
