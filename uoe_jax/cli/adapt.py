"""`uoe adapt`: a run adapted to other data by a few factors; the run stays as it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from uoe_jax.cli.parse import parse, typed_options
from uoe_jax.cli.paths import RUNS, find_run
from uoe_jax.config import LayoutConfig, MeshConfig
from uoe_jax.errors import ConfigError
from uoe_jax.escape import escape, escape_line
from uoe_jax.fields import Seed
from uoe_jax.files import format_json
from uoe_jax.validation import read_config


@dataclass(frozen=True, kw_only=True)
class AdaptOptions:
    """Adapt a run to other data with Tucker or LoRA factors, beside its weights."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]  # its folder, or a name in runs

    method: Literal["tucker", "lora"] = "tucker"  # three factors, or two

    rank: int = 8  # of the factors; cut where a weight has less

    # File, folder, glob, tfds:NAME, stdlib or digits; the run's own if not given.
    data: str | None = None

    steps: int = 300  # 0: only merge what --load names

    learning_rate: float = 3e-3  # highest; after a warm-up it falls

    batch_size: int | None = None  # the run's if not given

    # Shell patterns on parameter names; every projection of the blocks by default.
    targets: tuple[str, ...] = ("*.attention.w?", "*.mlp.w_*")

    rank_pattern: tuple[str, ...] = ()  # PATTERN=RANK, first match wins; 0: leave out

    alpha: float | None = None  # scale; the init's published default if not given

    # How factors start, as published; docs/adapters.md has what each draws.
    init: Literal["flora", "loralib", "peft", "gaussian", "orthonormal", "hosvd"] = (
        "peft"
    )

    split_heads: bool = False  # Tucker: heads, groups and head width as own modes

    share_experts: bool = False  # a union's experts share their factors

    rslora: bool = False  # scale alpha over the root of the rank

    dora: bool = False  # learned magnitudes of the outputs

    dropout: float = 0.0  # of the adapter's input

    # How products are computed: with the small factors, or with the whole delta.
    path: Literal["auto", "delta", "fused", "factored"] = "auto"

    # Start from this adapter folder, or PEFT's LoRA; its method and ranks stay.
    load: Path | None = None

    merge: bool = False  # also write a run with the deltas in its weights

    checkpoint: Literal["last", "best"] = "last"  # of the run

    # Devices by axis; as many as divide a pass over data if nothing is given.
    mesh: MeshConfig = field(default_factory=MeshConfig)

    layout: LayoutConfig = field(default_factory=LayoutConfig)

    out: Path | None = None  # new folder; runs/<name>-<method><rank> if not given

    seed: Seed = 0  # of the factors and the order of the data

    json: bool = False  # one JSON object instead of tables

    quiet: bool = False  # no progress


# What an adapter that is loaded brings with it.
SHAPE = ("method", "rank", "targets", "rank_pattern", "alpha", "init", "split_heads",
         "share_experts", "rslora", "dora", "dropout")  # fmt: skip
TRAINING = ("learning_rate", "seed")  # what only training asks for


def adapt(args: list[str]) -> int:
    """Train an adapter of a run; print its parameters, memory, speed and gain."""
    options = parse(AdaptOptions, args, "adapt")
    folder = find_run(options.run)
    typed = typed_options(args, AdaptOptions)
    given = {name[2:].replace("-", "_") for name in typed}
    check_load(options, given)
    name = f"{read_config(folder).name}-{options.method}{options.rank}"
    out = options.out or RUNS / name

    from uoe_jax.cli.device import prepare

    prepare()
    from uoe_jax.adapt.request import AdaptRequest
    from uoe_jax.adapt.run import adapt_run

    request = AdaptRequest(
        adapter=None if options.load else _adapter(options),
        load=options.load,
        data=options.data,
        steps=options.steps,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        which=options.checkpoint,
        path=options.path,
        seed=options.seed,
        mesh=options.mesh if any(n.startswith("mesh.") for n in given) else None,
        layout=options.layout,
        merge=options.merge,
    )
    quiet = options.quiet or options.json
    report = adapt_run(folder, out, request, quiet=quiet)
    if options.json:
        print(format_json(report, indent=2))
    else:
        print(escape(describe(report)))
        print(escape_line(f"adapter: {out}"))
    return 0


def _adapter(options: AdaptOptions) -> Any:
    from uoe_jax.adapt.config import AdapterConfig

    return AdapterConfig(
        method=options.method,
        rank=options.rank,
        targets=options.targets,
        rank_pattern=_patterns(options.rank_pattern),
        alpha=options.alpha,
        init=options.init,
        split_heads=options.split_heads,
        share_experts=options.share_experts,
        use_rslora=options.rslora,
        use_dora=options.dora,
        dropout=options.dropout,
    )


def check_load(options: AdaptOptions, given: set[str]) -> None:
    """Raise ConfigError for given options that have nothing to decide.

    A loaded adapter settles its own shape; without steps nothing is trained.
    """
    if options.load is None:
        return
    for name in SHAPE:
        if name in given:
            raise ConfigError(
                f"{_shown(name, options)} with --load; a loaded adapter keeps its own: "
                "leave one of them out"
            )
    for name in TRAINING if options.steps == 0 else ():
        if name in given:
            raise ConfigError(
                f"{_shown(name, options)} with --steps 0; nothing is trained: leave it "
                "out or take steps"
            )
    if options.out is None:
        raise ConfigError(
            f"--load {options.load} without --out; say which new folder the result "
            "goes to"
        )


def _shown(name: str, options: AdaptOptions) -> str:
    return f"--{name.replace('_', '-')} is {getattr(options, name)!r}"


def _patterns(words: tuple[str, ...]) -> dict[str, int]:
    """Return rank patterns from `*.wq=16`."""
    found = {}
    for word in words:
        pattern, _, rank = word.rpartition("=")
        if not pattern or not rank.isdigit():
            raise ConfigError(
                f"rank pattern is {word!r}; write PATTERN=RANK, as in *.wq=16"
            )
        found[pattern] = int(rank)
    return found


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
