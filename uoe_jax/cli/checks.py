"""`uoe leakcheck` and `uoe data`: what a model may see, and what it is fed."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from uoe_jax.cli.parse import Experiment, check_typed, parse, take_preset
from uoe_jax.cli.paths import run_or_preset
from uoe_jax.config import ModelConfig
from uoe_jax.errors import ConfigError
from uoe_jax.escape import escape, escape_line
from uoe_jax.fields import Count, Seed
from uoe_jax.files import format_json
from uoe_jax.kinds import ATTENTIONS, MLPS, ROUTERS
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
    check_length(options.length, structure)

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


def check_length(length: int | None, model: ModelConfig) -> None:
    """Raise ConfigError for a length that a model's probes can't have."""
    if length is None:
        return
    if model.kind == "vision":
        raise ConfigError(
            f"--length is {length} and model.kind 'vision'; images have a size of "
            "their own, leave it out"
        )
    if not 3 <= length <= model.max_seq_len:
        raise ConfigError(
            f"--length is {length}; it must be 3 (a past, a present and a future) to "
            f"{model.max_seq_len}, model.max_seq_len of what is checked"
        )


def probe_length(model: ModelConfig) -> int:
    """Return how many tokens it takes for every router to decide a few times."""
    units = [8]
    for attention, mlp in set(model.layer_kinds):
        units.append(ATTENTIONS[attention].span(model))
        units.append(min(max(model.window), 64))
        for router in (ATTENTIONS[attention].router(model), MLPS[mlp].router(model)):
            if router is not None:
                units.append(ROUTERS[router.router].span(router))
    return 3 * max(units)


def scaled_down(model: ModelConfig) -> ModelConfig:
    """Return a model of the same structure that checks in seconds on a CPU.

    Kept: kinds and their pattern, experts and choices, query groups, heads per expert
    up to 2, patch size, norms, positions, biases. Blocks of block-sparse attention and
    segments of expert selection are at most 8 tokens.
    """
    routed = any(ATTENTIONS[kind].router(model) for kind in model.attention)
    experts = model.union_for("attention").num_experts if routed else 1
    per_expert = min(model.num_kv_heads // experts, 2)
    kv_heads = experts * per_expert
    pattern = max(
        len(model.attention), len(model.mlp), len(model.blocks), len(model.window)
    )
    width = min(model.d_model, 64)
    # Divisible by the union's experts and by the mixture's choices.
    d_ff = 4 * model.union.num_experts * model.moe.top_k
    moe = dataclasses.replace(
        model.moe, d_expert=None if model.moe.d_expert is None else 16
    )
    union, moba = model.union, model.moba
    segment, block = min(union.segment_size, 8), min(moba.block_size, 8)
    return dataclasses.replace(
        model,
        union=dataclasses.replace(union, segment_size=segment),
        moba=dataclasses.replace(moba, block_size=block),
        vocab_size=min(model.vocab_size, 256),
        max_seq_len=min(model.max_seq_len, max(256, 2 * model.union.patch_size)),
        d_model=width,
        d_ff=min(model.d_ff, d_ff),
        num_layers=min(model.num_layers, 2 * pattern),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * model.num_query_groups,
        head_dim=min(model.head_dim, 16),
        window=tuple(min(window, 8) for window in model.window),
        moe=moe,
    )


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
        if key not in ("splits", "sample", "bad_utf8") and value
    }
    width = max(map(len, words))
    for key, value in words.items():
        print(f"{key:<{width}}  {escape_line(str(value))}")
    columns = ("documents", "bytes", "tokens", "examples", "batches")
    rows = [
        (name, *("-" if split[c] is None else si(split[c]) for c in columns))
        for name, split in found["splits"].items()
    ]
    print("\n" + format_table(("split", *columns), rows))
    for name, split in found["splits"].items():
        if split.get("lost_share"):
            print(
                f"note: the tokenizer doesn't know {split['lost_share']:.1%} of {name}"
            )
        if "problem" in split:
            print(f"note: {escape_line(split['problem'])}")
    print("\nfirst training example:")
    if options.raw:
        sys.stdout.flush()
        sys.stdout.buffer.write(found["sample"].encode("utf-8", "replace") + b"\n")
        sys.stdout.buffer.flush()
    else:
        print(escape(found["sample"]))
    return 0
