"""`uoe compress`: a run made smaller, without training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from uoe_jax.cli.fields import part_of, typed_options
from uoe_jax.cli.parse import parse
from uoe_jax.compress.options import ANYTIME, Compress, Curve, percent
from uoe_jax.errors import ConfigError
from uoe_jax.escape import escape
from uoe_jax.files import format_json
from uoe_jax.runs.find import RUNS, find_run
from uoe_jax.runs.stored import run_folder
from uoe_jax.stores.mirror import named
from uoe_jax.validation import read_config


@dataclass(frozen=True, kw_only=True)
class CompressOptions(Curve):
    """Cut a share of a run's neurons, pairs and values; fit what is left."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]  # or runs/RUN

    checkpoint: Literal["last", "best"] = "last"  # of the run

    out: Path | None = None  # folder of the new run; runs/<name>-<method><cut>

    json: bool = False  # one JSON object instead of lines


def compress(args: list[str]) -> int:
    """Write a smaller run; print its size, and its loss before and after."""
    options = parse(CompressOptions, args, "compress")
    options.check()
    folder = find_run(options.run)
    check_opened(folder, typed_options(args, CompressOptions))
    out = options.out or RUNS / f"{read_config(folder).name}-{_ending(options)}"
    out = run_folder(out, "--out", writes=True)

    from uoe_jax.cli.device import prepare

    prepare()
    from uoe_jax.compress.apply import compress_run

    which = options.checkpoint
    if options.curve:
        from uoe_jax.compress.curve import compare_run

        found = compare_run(folder, out, part_of(options, Curve), which=which)
    else:
        found = compress_run(folder, out, part_of(options, Compress), which=which)
    if options.json:
        print(format_json(found, indent=2))
    else:
        print(escape("\n".join(_lines(found, named(out)))))
    return 0


def check_opened(folder: Path, typed: set[str]) -> None:
    """Raise ConfigError for what a run that opens at any cut has no use for."""
    if {"--anytime", "--curve"} & typed or not (folder / ANYTIME).is_file():
        return
    if given := sorted({"--calibrate", "--statistics"} & typed):
        raise ConfigError(
            f"{folder} opens at any cut, and nothing is observed for one; leave out "
            f"{' and '.join(given)}"
        )


def _ending(options: CompressOptions) -> str:
    """Return what the name of the new run ends with."""
    if options.anytime or options.curve:
        return "anytime" if options.anytime else "curve"
    size = f"-rank{options.rank}" if options.rank else percent(options.cut or 0.0)
    return f"{options.chosen}{size}"


def _lines(found: dict[str, Any], out: str) -> list[str]:
    """Return what was found as lines of text."""
    from uoe_jax.compress.curve import table

    if found["did"] == "curve":
        return [table(found), f"table, picture and figures: {out}"]
    if found["did"] == "anytime":
        return _lines_of_anytime(found, out)
    share = lambda name: found[name][1] / max(found[name][0], 1) - 1
    sizes = {"parameters": "parameters", "of them in blocks": "block_parameters",
             "FLOPs a token": "flops_per_token"}  # fmt: skip
    lines = [
        f"{title}: {found[name][0]:,.0f} -> {found[name][1]:,.0f} ({share(name):+.1%})"
        for title, name in sizes.items()
    ]
    if share("parameters") > 0:
        lines.append(
            "the whole grew: the embedding and the head were one matrix and are two "
            "now; a larger --cut makes up for it, or another --method"
        )
    before, after = found["loss_before"], found["loss_after"]
    perplexity = lambda loss: math.exp(min(loss, 700.0))
    lines.append(
        f"held out, {found['probe_tokens']:,} targets: loss {before:.4f} -> "
        f"{after:.4f}, perplexity {perplexity(before):.2f} -> {perplexity(after):.2f}"
    )
    lines.append(f"run: {out}; heal it with: uoe train {out} --train.steps N")
    return lines


def _lines_of_anytime(found: dict[str, Any], out: str) -> list[str]:
    same = "the same function" if found["exact"] else "not the same function"
    return [
        f"blocks: {found['block_bytes'] / 1e6:,.1f} MB, beside them "
        f"{found['bytes_beside'] / 1e6:,.1f} MB: {found['file_share']:.3f} times",
        f"whole: largest logit difference {found['max_logit_difference']:.3g} on "
        f"{found['probe_tokens']:,} targets (largest logit {found['max_logit']:.3g}): "
        f"{same}",
        f"run: {out}; open it smaller: uoe eval {out} --cut 0.3",
    ]
