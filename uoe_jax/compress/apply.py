"""A run made smaller: seen on a text, sorted, cut, and written as another run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from uoe_jax.compress.methods import sort_layers
from uoe_jax.compress.options import LEAST_TOKENS, Compress
from uoe_jax.compress.statistics import check_kinds, observe
from uoe_jax.compress.widths import (
    choose_widths,
    error_curves,
    layer_parts,
    with_widths,
)
from uoe_jax.config import ExperimentConfig, LayerWidths
from uoe_jax.data.progress import note_once
from uoe_jax.errors import ConfigError, DataError
from uoe_jax.fields import check_ranges
from uoe_jax.hardware.count import count_params, flops_per_token
from uoe_jax.model import with_params
from uoe_jax.model.stacks import to_layers
from uoe_jax.runs.probe import in_float32
from uoe_jax.surgery import Changed, Form, Source, Surgery, Which, operate
from uoe_jax.tree import Arrays

ENOUGH = 10  # calibration tokens for each neuron of an expert


def compress_run(
    folder: Path, out: Path, options: Compress, *, which: Which = "last"
) -> dict[str, Any]:
    """Write a run's checkpoint, made smaller, as a run into `out`; return the report.

    Raises what `operate` does, and ConfigError for options that contradict each other
    or the model.
    """
    check_ranges(options, "compress.")
    options.check()
    return operate(folder, out, cutting(options), verb="compress", which=which)


def cutting(options: Compress) -> Surgery:
    """Return the change that cuts a share of a model's channels."""

    def change(config: ExperimentConfig, params: Arrays, source: Source) -> Changed:
        model = config.model
        check_kinds(model)
        if model.widths != LayerWidths():
            raise ConfigError(
                f"the layers of {source.folder} are of unequal width already; "
                "compress the run that it was made of"
            )
        batch = source.calibration(options.calibrate)
        tokens = _count(batch)
        if tokens < LEAST_TOKENS:
            raise DataError(
                f"the calibration text has {tokens} tokens; at least {LEAST_TOKENS} "
                f"are needed, and {ENOUGH} for each neuron for good fits"
            )
        note_once(f"compress: what {model.num_layers} layers do on {tokens:,} tokens")
        dense = with_params(in_float32(model), params, source.buffers)
        seen = observe(dense, batch)
        _warn(seen)
        rest, layers = to_layers(params, model)
        found = sort_layers(options.method, layers, seen, model.rotates)
        curves = [error_curves(a, b) for a, b in zip(found, seen, strict=True)]
        parts = layer_parts(model, curves, options)
        influences = np.array([layer.influence for layer in seen])
        widths = choose_widths(parts, influences, options.cut or 0.0, options)
        buffers = to_layers(source.buffers, model)[1]
        made = with_widths(model, (rest, layers), found, parts, widths, buffers)
        name = f"{config.name}-{options.method}{round(100 * (options.cut or 0))}"
        new = dataclasses.replace(config, name=name, model=made.config)
        before, after = (_size(c) for c in (config, new))
        report = {
            "method": options.method,
            "allocate": options.allocate,
            "cut": options.cut,
            "calibration": str(options.calibrate),
            "calibration_tokens": tokens,
            "parameters": [before[0], after[0]],
            "block_parameters": [before[1], after[1]],
            "flops_per_token": [before[2], after[2]],
            "influence": influences.tolist(),
        }
        return Changed(
            did="compress",
            config=new,
            params=made.params,
            buffers=made.buffers,
            report=report,
            source_name="before",
            forms={"after": Form(made.config, made.params, made.buffers)},
            same=False,
        )

    return change


def _count(batch: Any) -> int:
    """Return how many of a batch's tokens aren't padding."""
    if "segments" in batch:
        return int((np.asarray(batch["segments"]) != 0).sum())
    return int(len(batch["images"]))


def _warn(seen: Any) -> None:
    """Say once if there is less text than good fits need."""
    neurons = seen[0].neurons.shape[1]
    least = min(float(layer.expert_tokens.min()) for layer in seen)
    if least < ENOUGH * neurons:
        note_once(
            f"compress: {least:,.0f} tokens for {neurons:,} neurons of an expert; "
            f"from {ENOUGH * neurons:,} on fits are good: give a longer --calibrate"
        )


def _size(config: ExperimentConfig) -> tuple[int, int, float]:
    """Return parameters, those of the blocks' weights, and FLOPs a token."""
    parts = count_params(config.model)
    blocks = sum(parts.get(name, 0) for name in ("attention", "mlp"))
    flops = flops_per_token(config.model, config.seq_len).forward
    return sum(parts.values()), blocks, flops
