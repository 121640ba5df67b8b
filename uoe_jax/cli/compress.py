"""`uoe compress`: a run made smaller, without training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from uoe_jax.cli.fields import part_of
from uoe_jax.cli.parse import parse
from uoe_jax.compress.options import Compress
from uoe_jax.escape import escape
from uoe_jax.files import format_json
from uoe_jax.runs.find import RUNS, find_run
from uoe_jax.validation import read_config


@dataclass(frozen=True, kw_only=True)
class CompressOptions(Compress):
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
    ending = f"{options.method}{round(100 * (options.cut or 0))}"
    out = options.out or RUNS / f"{read_config(folder).name}-{ending}"

    from uoe_jax.cli.device import prepare

    prepare()
    from uoe_jax.compress.apply import compress_run

    wanted = part_of(options, Compress)
    found = compress_run(folder, out, wanted, which=options.checkpoint)
    if options.json:
        print(format_json(found, indent=2))
    else:
        print(escape("\n".join(_lines(found, out))))
    return 0


def _lines(found: dict[str, Any], out: Path) -> list[str]:
    """Return what was found as lines of text."""
    share = lambda name: 1 - found[name][1] / max(found[name][0], 1)
    sizes = {"parameters": "parameters", "of them in blocks": "block_parameters",
             "FLOPs a token": "flops_per_token"}  # fmt: skip
    lines = [
        f"{title}: {found[name][0]:,.0f} -> {found[name][1]:,.0f} (-{share(name):.1%})"
        for title, name in sizes.items()
    ]
    before, after = found["loss_before"], found["loss_after"]
    perplexity = lambda loss: math.exp(min(loss, 700.0))
    lines.append(
        f"held out, {found['probe_tokens']:,} targets: loss {before:.4f} -> "
        f"{after:.4f}, perplexity {perplexity(before):.2f} -> {perplexity(after):.2f}"
    )
    lines.append(f"run: {out}; heal it with: uoe train {out} --train.steps N")
    return lines
