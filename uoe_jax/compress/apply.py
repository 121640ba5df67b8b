"""A run made smaller: seen on a text, cut, and written as another run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from uoe_jax.compress.anytime import read_anytime, sort_run, write_anytime
from uoe_jax.compress.methods import check_method, prepare, sort_model
from uoe_jax.compress.observed import Observed, block_params, take_apart
from uoe_jax.compress.options import (
    ANYTIME,
    FITTED,
    LEAST_TOKENS,
    Compress,
    Curve,
    percent,
)
from uoe_jax.compress.sorting import ENOUGH, few_tokens
from uoe_jax.compress.statistics import check_kinds
from uoe_jax.compress.stored import STATISTICS, stored_statistics
from uoe_jax.compress.widths import find_gemm
from uoe_jax.config import ExperimentConfig, LayerWidths
from uoe_jax.data.progress import note_once
from uoe_jax.data.record import read_record
from uoe_jax.errors import ConfigError, DataError
from uoe_jax.fields import check_ranges
from uoe_jax.files import local_path
from uoe_jax.hardware.count import count_params, flops_per_token
from uoe_jax.surgery import Changed, Form, Source, Surgery, Which, operate
from uoe_jax.tree import Arrays


def compress_run(
    folder: Path, out: Path, options: Compress, *, which: Which = "last"
) -> dict[str, Any]:
    """Write a run's checkpoint, made smaller, as a run into `out`; return the report.

    With `anytime` the new run is the same function, and opens at any cut.

    Raises what `operate` does, and ConfigError for options that contradict each other
    or the model.
    """
    check_ranges(options, "compress.")
    options.check()
    change = ordering(options) if options.anytime else cutting(options)
    return operate(folder, out, change, verb="compress", which=which)


def cutting(options: Compress) -> Surgery:
    """Return the change that cuts a share of a model's channels, ranks or layers.

    Of a run that opens at any cut, nothing is observed.
    """

    def change(config: ExperimentConfig, params: Arrays, source: Source) -> Changed:
        model, wanted, about = config.model, options, {}
        if (source.folder / ANYTIME).is_file():
            arrays = (params, source.buffers)
            ready, wanted = read_anytime(source.folder, model, *arrays, options)
            options.check_read(wanted)
            made = ready.cut(wanted)
        else:
            options.check_read(options)
            check_method(model, options)
            observed, about = look(config, params, source, options)
            made = prepare(observed, options.chosen)(options)
        size = percent(wanted.cut) if wanted.cut else f"-rank{wanted.rank}"
        name = f"{config.name}-{wanted.chosen}{size}"
        new = dataclasses.replace(config, name=name, model=made.config)
        return Changed(
            did="compress",
            config=new,
            params=made.params,
            buffers=made.buffers,
            report=_report(config, new, wanted) | about,
            source_name="before",
            forms={"after": Form(*made)},
            same=False,
        )

    return change


def ordering(options: Compress) -> Surgery:
    """Return the change that puts a model's channels in order, for cuts to come."""

    def change(config: ExperimentConfig, params: Arrays, source: Source) -> Changed:
        observed, about = look(config, params, source, options)
        made, beside = sort_run(sort_model(observed, options.chosen))
        new = dataclasses.replace(config, name=f"{config.name}-anytime")
        size = sum(array.nbytes for array in beside.values())
        blocks = _block_bytes(observed)
        about |= {"block_bytes": blocks, "bytes_beside": size,
                  "file_share": (blocks + size) / blocks}  # fmt: skip
        return Changed(
            did="anytime",
            config=new,
            params=made.params,
            buffers=made.buffers,
            report=_report(config, new, options) | about,
            source_name="before",
            forms={"after": Form(*made)},
            files={ANYTIME: lambda path: write_anytime(path, made, beside, options)},
        )

    return change


def look(
    config: ExperimentConfig, params: Arrays, source: Source, options: Compress
) -> tuple[Observed, dict[str, Any]]:
    """Return a model by layer with what its text shows, and what to report of that.

    Raises ConfigError for a model that can't be compressed, or statistics of another,
    DataError for too little text.
    """
    model, way = config.model, options.way()
    check_kinds(model)
    if way.allocate == "seconds":  # not only when a cut is made
        find_gemm(way.device)
    if model.widths != LayerWidths():
        raise ConfigError(
            f"the layers of {source.folder} are of unequal width already; compress the "
            "run that it was made of"
        )
    batch = source.calibration(options.calibrate)
    tokens = count_tokens(batch)
    if tokens < LEAST_TOKENS:
        raise DataError(
            f"the calibration text has {tokens} tokens; at least {LEAST_TOKENS} are "
            f"needed, and {ENOUGH} for each neuron for good fits"
        )
    file = source.folder / STATISTICS
    if options.statistics is not None:
        file = local_path(options.statistics, "--statistics")
    record = read_record(source.folder)
    seen = stored_statistics(
        file,
        model,
        (params, source.buffers),
        batch,
        record.tokenizer_identity if record else None,
        given=options.statistics is not None,
    )
    observed = take_apart(model, params, source.buffers, seen)
    methods = options.compared if isinstance(options, Curve) and options.curve else ()
    if {*FITTED} & {*(methods or (options.chosen,))}:
        _warn(observed)
    return observed, {
        "calibration": str(options.calibrate),
        "calibration_tokens": tokens,
        "influence": observed.influences.tolist(),
    }


def _report(
    before: ExperimentConfig, after: ExperimentConfig, options: Compress
) -> dict[str, Any]:
    """Return what a report says of the sizes, and of how they came about."""
    sizes = [
        (
            sum(count_params(c.model).values()),
            block_params(c.model),
            flops_per_token(c.model, c.seq_len).forward,
        )
        for c in (before, after)
    ]
    names = ("parameters", "block_parameters", "flops_per_token")
    pairs = zip(names, zip(*sizes, strict=True), strict=True)
    return {
        "method": options.chosen,
        "allocate": options.spread,
        "cut": options.cut,
        "rank": options.rank,
        **{name: list(pair) for name, pair in pairs},
    }


def _block_bytes(observed: Observed) -> int:
    parts = ("attention.", "mlp.")
    return sum(
        array.nbytes
        for layer in observed.layers
        for name, array in layer.items()
        if name.startswith(parts)
    )


def count_tokens(batch: Any) -> int:
    """Return how many of a batch's tokens aren't padding."""
    if "segments" in batch:
        return int((np.asarray(batch["segments"]) != 0).sum())
    return int(len(batch["images"]))


def _warn(observed: Observed) -> None:
    """Say once if there is less text than good fits need."""
    few = np.concatenate([few_tokens(layer) for layer in observed.seen])
    if not few.any():
        return
    neurons = max(layer.neurons.shape[1] for layer in observed.seen)
    least = min(float(layer.expert_tokens.min()) for layer in observed.seen)
    shared = ""
    if any(layer.all_neurons.size for layer in observed.seen):
        shared = f"; {few.sum()} of {few.size} experts are fitted on all tokens instead"
    note_once(
        f"compress: {least:,.0f} tokens for {neurons:,} neurons of an expert{shared}; "
        f"from {ENOUGH * neurons:,} on fits are good: give a longer --calibrate"
    )
