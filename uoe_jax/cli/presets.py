"""`uoe presets` and `uoe config`: what can be trained, and one of it as JSON."""

from __future__ import annotations

from dataclasses import dataclass

from uoe_jax.cli.parse import Experiment, parse, take_preset
from uoe_jax.config import ExperimentConfig, to_json
from uoe_jax.files import format_json
from uoe_jax.hardware.count import count_params, flops_per_token
from uoe_jax.presets import PRESETS, get_preset
from uoe_jax.report.table import format_table, si
from uoe_jax.validation import validate


@dataclass(frozen=True, kw_only=True)
class PresetsOptions:
    """List the presets: kinds, sizes, and what a token costs in the forward pass."""

    json: bool = False  # one JSON object instead of a table


@dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    """Print a preset as JSON, with the options given; `--config FILE` reads it."""

    config: Experiment


def presets(args: list[str]) -> int:
    """Print a table of the presets; returns 0."""
    options = parse(PresetsOptions, args, "presets")
    found = {name: describe(get_preset(name)) for name in PRESETS}
    if options.json:
        print(format_json(found, indent=2))
        return 0
    header = ("preset", "kind", "attention", "mlp", "layers", "width", "tokens",
              "parameters", "a token")  # fmt: skip
    rows = [
        (
            name,
            about["kind"],
            about["attention"],
            about["mlp"],
            about["num_layers"],
            about["d_model"],
            about["seq_len"],
            si(about["parameters"]),
            si(about["flops_per_token"], "FLOP"),
        )
        for name, about in found.items()
    ]
    print(format_table(header, rows))
    print(
        "\nsized-N (N from 2) has N layers and a width of 64 N. "
        "uoe train PRESET trains one, uoe cost PRESET counts it."
    )
    return 0


def describe(config: ExperimentConfig) -> dict:
    """Return a preset's kinds and sizes as plain numbers and words."""
    model = config.model
    mod = " in mod blocks" if "mod" in model.blocks else ""
    return {
        "kind": model.kind,
        "attention": "+".join(model.attention),
        "mlp": "+".join(model.mlp) + mod,
        "num_layers": model.num_layers,
        "d_model": model.d_model,
        "seq_len": config.seq_len,
        "parameters": sum(count_params(model).values()),
        "flops_per_token": flops_per_token(model, config.seq_len).forward,
    }


def config(args: list[str]) -> int:
    """Print the config of `PRESET [options]` as JSON; returns 0."""
    preset, rest = take_preset(args, "config")
    options = parse(ConfigOptions, rest, "config", default=ConfigOptions(config=preset))
    validate(options.config)
    print(to_json(options.config), end="")
    return 0
