"""`uoe decompose`: a dense run into a union run and back, without training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from uoe_jax.cli.parse import parse
from uoe_jax.cli.paths import RUNS, find_run
from uoe_jax.errors import ConfigError
from uoe_jax.escape import escape
from uoe_jax.fields import Seed
from uoe_jax.files import format_json
from uoe_jax.validation import read_config

Grouping = Literal["contiguous", "random", "coactivation"]
_PARTS: dict[str, tuple[Literal["attention", "mlp"], ...]] = {
    "both": ("attention", "mlp"),
    "attention": ("attention",),
    "mlp": ("mlp",),
}
_ROUTERS: dict[str, Literal["zero", "least_squares"] | None] = {
    "auto": None,
    "zero": "zero",
    "least-squares": "least_squares",
}


@dataclass(frozen=True, kw_only=True)
class DecomposeOptions:
    """Split a dense run into a union of experts, exactly, or merge one back."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]  # or runs/RUN

    experts: int | None = None  # experts of every attention and MLP block

    top_k: int | None = None  # experts a token uses; all of them if not given

    attention_experts: int | None = None  # where heads need another number

    shared: int = 0  # MLP experts always on, of --top-k: the neurons that write most

    parts: Literal["both", "attention", "mlp"] = "both"  # what is cut

    grouping: Grouping = "contiguous"  # which neurons become an expert together

    # How routers start: at zero every gate is 1; least squares fits the experts' share
    # of each token. By default zero where all experts are used.
    router: Literal["auto", "zero", "least-squares"] = "auto"

    refit: bool = False  # fit the MLP's down-projections to the experts left on

    # A text file, or tokens of the run's training data, for co-activation and fits.
    calibrate: str = "16384"

    merge: bool = False  # a union run back into a dense one

    checkpoint: Literal["last", "best"] = "last"  # of the run

    out: Path | None = None  # folder of the new run; runs/<name>-union<E> or -dense

    seed: Seed = 0  # of random groups and of fits

    json: bool = False  # one JSON object instead of lines


def decompose(args: list[str]) -> int:
    """Write the other form of a run; print the largest difference on a probe batch."""
    options = parse(DecomposeOptions, args, "decompose")
    _check(options)
    folder = find_run(options.run)
    ending = "dense" if options.merge else f"union{options.experts}"
    out = options.out or RUNS / f"{read_config(folder).name}-{ending}"

    from uoe_jax.cli.device import prepare

    prepare()
    found = _work(options, folder, out)
    if options.json:
        print(format_json(found, indent=2))
    else:
        print(escape("\n".join(_lines(found, out))))
    return 0 if found["exact"] or options.merge else 1


def _check(options: DecomposeOptions) -> None:
    if options.merge:
        given = {
            "--experts": options.experts,
            "--top-k": options.top_k,
            "--attention-experts": options.attention_experts,
            "--shared": options.shared or None,
            "--refit": options.refit or None,
        }
        if names := [name for name, value in given.items() if value is not None]:
            raise ConfigError(
                f"--merge takes the experts of the run; leave out {', '.join(names)}"
            )
        return
    if options.experts is None:
        raise ConfigError(
            "uoe decompose takes --experts E, or --merge for a union: "
            "uoe decompose RUN --experts 8"
        )
    if options.experts < 1:
        raise ConfigError(f"--experts is {options.experts}; it must be at least 1")
    top_k = options.top_k
    if top_k is not None and not 1 <= top_k <= options.experts:
        raise ConfigError(
            f"--top-k is {top_k}; it must be 1 to --experts {options.experts}"
        )


def _work(options: DecomposeOptions, folder: Path, out: Path) -> dict[str, Any]:
    from uoe_jax.decompose.runs import Cut, decompose_run, merge_run

    if options.merge:
        return merge_run(folder, out, which=options.checkpoint)
    assert options.experts is not None
    source = options.calibrate
    cut = Cut(
        num_experts=options.experts,
        top_k=options.top_k,
        attention_experts=options.attention_experts,
        shared=options.shared,
        parts=_PARTS[options.parts],
        grouping=options.grouping,
        router=_ROUTERS[options.router],
        refit=options.refit,
        calibrate=int(source) if source.lstrip("-").isdigit() else Path(source),
        seed=options.seed,
    )
    return decompose_run(folder, out, cut, which=options.checkpoint)


def _lines(found: dict[str, Any], out: Path) -> list[str]:
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
