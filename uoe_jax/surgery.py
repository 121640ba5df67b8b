"""A run changed into another: loaded, changed, compared on its own data, written.

A change is a function from a model's config and parameters to others and a report of
what it found. It says what may be compared with the model it came from; everything else
is the same for all changes and stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from uoe_jax.config import ExperimentConfig, ModelConfig
from uoe_jax.data.progress import note
from uoe_jax.data.record import DataRecord, carried_record
from uoe_jax.model import flat_buffers, flat_params, with_params
from uoe_jax.runs.batches import Batch, calibration_batch, count_scored, probe_batch
from uoe_jax.runs.load import LoadedRun, load_run, run_dataset
from uoe_jax.runs.probe import TOLERANCE, in_float32, probe_each
from uoe_jax.runs.stored import run_folder
from uoe_jax.runs.write import Origin, check_free, write_run
from uoe_jax.stores.mirror import named
from uoe_jax.tree import Arrays
from uoe_jax.validation import float8_problems, validate

Which = Literal["last", "best"]


class Form(NamedTuple):
    """A model to compare: its config, its parameters, its routers' biases."""

    config: ModelConfig
    params: Mapping[str, Any]
    buffers: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a change may look at beside the config and the parameters."""

    folder: Path
    config: ExperimentConfig
    buffers: Arrays  # the routers' biases

    def calibration(self, source: Path | int) -> Batch:
        """Return a batch to calibrate on: a text's, or so many tokens of the run's."""
        return calibration_batch(self.config, source)

    def held_out(self) -> Batch:
        """Return a batch of the run's validation data."""
        return probe_batch(run_dataset(self.folder, self.config, "valid"))


@dataclass(frozen=True, kw_only=True)
class Changed:
    """What a change makes of a model; arrays by name.

    `forms` are compared with the source on a batch of the new run's validation data, by
    what they are called in the report. With `same` the first is meant to be the same
    function as the source, and the report says whether it is, up to rounding: `exact`.
    """

    did: str  # split, merge
    config: ExperimentConfig
    params: Mapping[str, Any]
    buffers: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    source_name: str = "source"  # in the report: loss_<source_name>
    forms: Mapping[str, Form] = field(default_factory=dict)
    same: bool = True
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)  # kept, by file name
    # Other files, by name, and what writes each.
    files: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    data: DataRecord | None = None  # None: the source's


Surgery = Callable[[ExperimentConfig, Arrays, Source], Changed]


def operate(
    folder: Path,
    out: Path,
    change: Surgery,
    *,
    verb: str,
    which: Which = "last",
    load: Callable[..., LoadedRun] = load_run,
) -> dict[str, Any]:
    """Write what `change` makes of a run's checkpoint into `out`; return the report.

    The new run stands at the source's step and has spent what the source spent. `load`
    reads the source.

    Raises ConfigError if `out` holds something or the run can't be changed so,
    CheckpointError or DataError if the run or its data can't be read.
    """
    folder = run_folder(folder, "the run")
    out = run_folder(out, "out", writes=True)
    run = load(folder, which=which)
    check_free(out)
    params, buffers = flat_params(run.model), flat_buffers(run.model)
    source = Source(folder=folder, config=run.config, buffers=buffers)
    # What a change makes may have sides that products of eight bits don't take.
    scales = run.config.model.float8
    changed = change(_of_scales(run.config, "none"), params, source)
    wanted = _of_scales(changed.config, scales)
    if list(float8_problems(wanted.model)):
        note(
            f"{verb}: model.float8 is none in the new run, whose weights don't take it"
        )
    else:
        changed = replace(changed, config=wanted)
    validate(changed.config)
    report = {
        "did": changed.did,
        "run": named(folder),
        "step": run.step,
        **changed.report,
    }
    if changed.forms:
        batch = probe_batch(
            run_dataset(folder, run.config, "valid", changed.config.data)
        )
        note(f"{verb}: comparing both models on {count_scored(batch):,} targets ...")
        report |= _compare(Form(run.config.model, params, buffers), changed, batch)
    origin = Origin(
        made_by=verb,
        source=named(folder),
        step=run.step,
        spent=run.progress.spent(),
        data=changed.data or carried_record(folder, changed.config),
        report=report,
        arrays=changed.arrays,
        files=changed.files,
    )
    write_run(out, changed.config, changed.params, origin, buffers=changed.buffers)
    return report


def _of_scales(
    config: ExperimentConfig, scales: Literal["none", "tensor", "rows"]
) -> ExperimentConfig:
    return replace(config, model=replace(config.model, float8=scales))


def _compare(source: Form, changed: Changed, batch: Batch) -> dict[str, Any]:
    """Return how far the changed forms are from the source: logits and losses."""
    forms = {name: _in_float32(form) for name, form in changed.forms.items()}
    seen = probe_each(_in_float32(source), forms, batch)
    first = next(iter(seen.values()))
    verdict = {"tolerance": TOLERANCE, "exact": first.exact} if changed.same else {}
    return {
        "probe_tokens": count_scored(batch),
        "max_logit_difference": first.max_logit_difference,
        "max_logit": first.max_logit,
        **verdict,
        f"loss_{changed.source_name}": first.reference_loss,
        **{f"loss_{name}": found.loss for name, found in seen.items()},
    }


def _in_float32(form: Form) -> Any:
    return with_params(in_float32(form.config), form.params, form.buffers)
