"""`uoe leakcheck` and `uoe data`: what a model may see, and what it is fed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from uoe_jax.cli.notes import tell_loading
from uoe_jax.cli.parse import Experiment, check_typed, parse, take_preset
from uoe_jax.errors import ConfigError
from uoe_jax.escape import escape, escape_line
from uoe_jax.fields import Count, Seed
from uoe_jax.files import format_json
from uoe_jax.probes import check_length, probe_length, scaled_down
from uoe_jax.runs.find import run_or_preset
from uoe_jax.validation import validate


@dataclass(frozen=True, kw_only=True)
class LeakOptions:
    """Perturb what must not matter: future tokens, other rows, padding, documents.

    Prints what moved; the exit status is 1 if anything did. A large preset is scaled
    down in width and depth, its experts, heads per expert and patches staying.
    """

    target: Positional[Annotated[str, arg(metavar="PRESET|RUN")]]
    length: Count | None = None  # tokens of the probe sequences
    seed: Seed = 0  # of weights and probes


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Describe what a preset trains on: source, splits, tokens, hash."""

    config: Experiment
    json: bool = False  # one JSON object instead of tables
    raw: bool = False  # the example's control characters as they are, not escaped


def leakcheck(args: list[str]) -> int:
    """Check a preset or a run; 1 if anything moved that must not."""
    options = parse(LeakOptions, args, "leakcheck")
    folder, config = run_or_preset(options.target)
    validate(config)
    structure = scaled_down(config.model) if folder is None else config.model
    try:
        check_length(options.length, structure)
    except ConfigError as error:
        raise ConfigError(f"--{error}") from None
    tell_loading(options.target)

    from uoe_jax.cli.device import prepare

    prepare()
    import jax

    from uoe_jax.leakcheck import format_findings
    from uoe_jax.leakcheck import leakcheck as check

    if folder is not None:
        from uoe_jax.runs.load import load_run

        model, note = load_run(folder).model, ""
    else:
        from uoe_jax.model import make_model

        note = " (scaled down)" if structure != config.model else ""
        model = make_model(structure, jax.random.key(options.seed))
    length = options.length or min(structure.max_seq_len, probe_length(structure))
    findings = check(
        model, jax.random.fold_in(jax.random.key(options.seed), 1), length=length
    )
    print(f"{options.target}{note}, {length} tokens")
    print(format_findings(findings))
    moved = [finding for finding in findings if not finding.passed]
    print("nothing moved" if not moved else f"{len(moved)} checks found a leak")
    return 1 if moved else 0


def data(args: list[str]) -> int:
    """Prepare the data of `[PRESET] [options]` and print a description."""
    preset, rest = take_preset(args, "data", default="tiny")
    default = DataOptions(config=preset)
    options = parse(DataOptions, rest, "data", default=default, first="[PRESET]")
    validate(options.config)
    check_typed(rest, options.config.data, options.config.model.kind)

    from uoe_jax.data import describe
    from uoe_jax.report.table import format_table, si

    found = describe(options.config)
    if options.json:
        print(format_json(found, indent=2))
        return 0
    words = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else value
        for key, value in found.items()
        if key not in ("splits", "mix", "sample", "sample_scored", "bad_utf8") and value
    }
    width = max(map(len, words))
    for key, value in words.items():
        print(f"{key:<{width}}  {escape_line(str(value))}")
    columns = ("documents", "bytes", "tokens", "examples", "batches")
    if any("scored" in split for split in found["splits"].values()):
        columns = (*columns[:3], "scored", *columns[3:])
    cell = lambda split, c: "-" if split.get(c) is None else si(split[c])
    rows = [
        (name, *(cell(split, c) for c in columns))
        for name, split in found["splits"].items()
    ]
    print("\n" + format_table(("split", *columns), rows))
    if found["mix"]:
        _print_mix(found["mix"])
    for name, split in found["splits"].items():
        if split.get("lost_share"):
            print(
                f"note: the tokenizer doesn't know {split['lost_share']:.1%} of {name}"
            )
        if "problem" in split:
            print(f"note: {escape_line(split['problem'])}")
    print("\nfirst training example:")
    _print_sample(found["sample"], options.raw)
    if found["sample_scored"] is not None:
        print("\nof which is trained on:")
        _print_sample(found["sample_scored"], options.raw)
    return 0


def _print_mix(sources: list[dict]) -> None:
    """Print what each source of a mixture has, and its share of what is trained on."""
    from uoe_jax.report.table import format_table, si

    total = sum(source["tokens"]["train"] for source in sources)
    rows = [
        (
            escape_line(source["source"]),
            f"{source['weight']:g}",
            f"{source['rows']:.2%}",
            *(si(source["tokens"][split]) for split in ("train", "valid", "test")),
            f"{source['rows'] * total / max(source['tokens']['train'], 1):.2f}",
        )
        for source in sources
    ]
    header = ("source", "weight", "rows", "train tokens", "valid", "test", "passes")
    print("\n" + format_table(header, rows))
    print("passes: over each source, in as many rows as one pass over all has")


def _print_sample(text: str, raw: bool) -> None:
    if not raw:
        print(escape(text))
        return
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "replace") + b"\n")
    sys.stdout.buffer.flush()
