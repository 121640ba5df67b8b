"""`uoe decompose`: a dense run into a union run and back, without training."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from uoe_jax.cli.fields import option_fields, part_of, typed_options
from uoe_jax.cli.notes import tell_loading
from uoe_jax.cli.parse import parse
from uoe_jax.decompose.cut import Cut
from uoe_jax.errors import ConfigError
from uoe_jax.escape import escape
from uoe_jax.fields import Count
from uoe_jax.files import format_json
from uoe_jax.report.table import format_table
from uoe_jax.runs.find import RUNS, find_run
from uoe_jax.runs.stored import run_folder
from uoe_jax.stores.mirror import named
from uoe_jax.validation import read_config


@dataclass(frozen=True, kw_only=True)
class DecomposeOptions(Cut):
    """Split a dense run into a union of experts, exactly, or merge one back."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]  # or runs/RUN

    # Experts of every attention and MLP block; auto: as many as PPP finds among the
    # neurons. Left out with --merge.
    num_experts: Annotated[Count | Literal["auto"] | None, arg(name="experts")] = None  # pyrefly: ignore[bad-override]

    merge: bool = False  # a union run back into a dense one

    checkpoint: Literal["last", "best"] = "last"  # of the run

    out: Path | None = None  # folder of the new run; runs/<name>-union<E> or -dense

    json: bool = False  # one JSON object instead of lines

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts:
            self.check()


CUT = {f.name for f in fields(Cut)}


def decompose(args: list[str]) -> int:
    """Write the other form of a run; print the largest difference on a probe batch."""
    options = parse(DecomposeOptions, args, "decompose")
    _check(options, typed_options(args, DecomposeOptions))
    folder = find_run(options.run)
    ending = "dense" if options.merge else f"union{options.num_experts}"
    out = options.out or RUNS / f"{read_config(folder).name}-{ending}"
    out = run_folder(out, "--out", writes=True)
    tell_loading(folder)

    from uoe_jax.cli.device import prepare

    prepare()
    from uoe_jax.decompose.runs import decompose_run, merge_run

    if options.merge:
        found = merge_run(folder, out, which=options.checkpoint)
    else:
        cut = part_of(options, Cut)
        found = decompose_run(folder, out, cut, which=options.checkpoint)
    if options.json:
        print(format_json(found, indent=2))
    else:
        print(escape("\n".join(_lines(found, named(out)))))
    return 0 if found["exact"] or options.merge else 1


def _check(options: DecomposeOptions, typed: set[str]) -> None:
    """Raise ConfigError for a cut without experts, or one of a run to be merged."""
    if options.merge:
        cuts = [f.option for f in option_fields(DecomposeOptions) if f.name in CUT]
        if names := [option for option in cuts if option in typed]:
            raise ConfigError(
                f"--merge takes the experts of the run; leave out {', '.join(names)}"
            )
    elif options.num_experts is None:
        raise ConfigError(
            "uoe decompose takes --experts E, or --merge for a union: "
            "uoe decompose RUN --experts 8"
        )


def _lines(found: dict[str, Any], out: str) -> list[str]:
    """Return what was found as lines of text."""
    split = found["did"] == "split"
    verdict = "exact" if found["exact"] else "not the same function"
    other = "with every expert" if split else "of the merged model"
    lines = [
        f"largest logit difference {other}: {found['max_logit_difference']:.3g} on "
        f"{found['probe_tokens']:,} probe targets (largest logit "
        f"{found['max_logit']:.3g}): {verdict}"
    ]
    if split:
        bits = "the same bits" if found["weights_bitwise"] else "OTHER WEIGHTS"
        lines.append(f"merged back: {bits}")
        if "experts_found" in found:
            lines += _number_lines(found["experts_found"])
        if "groupings" in found:
            lines += [_groupings_table(found["groupings"]), ""]
        if found["refits"]:
            before, after = map(fmean, zip(*found["refits"].values(), strict=True))
            lines.append(
                "down-projections fitted again: relative error of an MLP's output "
                f"{before:.3f} -> {after:.3f}, mean of {len(found['refits'])} layers"
            )
        lines.append(
            f"loss: dense {found['loss_dense']:.4f}, every expert "
            f"{found['loss_all_experts']:.4f}, as written (top {found['top_k']} of "
            f"{found['num_experts']}) {found['loss_as_written']:.4f}"
        )
        lines.append(f"run: {out}; continue with: uoe train {out} --train.steps N")
    else:
        lines.append(
            f"loss: union {found['loss_union']:.4f}, dense {found['loss_dense']:.4f}"
        )
        lines.append(f"run: {out}")
    return lines


def _number_lines(number: dict[str, Any]) -> list[str]:
    """Return the number of experts that was found, and what its neighbours cost."""
    layers = ", ".join(map(str, number["layers"]))
    price = number["prices"].get(str(number["chosen"]))
    cost = "not tried" if price is None else f"ICL {price:.3g} a neuron above the least"
    return [
        f"experts auto: PPP takes {number['wanted']} for all layers (alone: {layers}); "
        f"{number['chosen']} fit the model: {cost}"
    ]


def _groupings_table(rows: list[dict[str, Any]]) -> str:
    """Return groupings side by side, each with its errors and its loss."""
    header = ["grouping", "error", "worst", "layer", "oracle", "loss"]
    return format_table(
        header,
        [
            [
                row["grouping"],
                f"{row['error']:.3f}",
                f"{row['worst_error']:.3f}",
                row["worst_layer"],
                f"{row['oracle_error']:.3f}",
                f"{row['loss']:.4f}",
            ]
            for row in rows
        ],
    )
