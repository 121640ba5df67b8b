"""A new run that starts from another run's parameters, all of them or those that fit.

What it started from is written into its folder, so that a run that is stopped before
its first save starts from the same again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optax
from jax.sharding import Mesh

from uoe_jax.config import ExperimentConfig, ModelConfig, content_hash
from uoe_jax.data.prepare import prepare
from uoe_jax.data.progress import note_once
from uoe_jax.data.record import TOKENIZER, read_record, record_of
from uoe_jax.errors import CheckpointError, ConfigError
from uoe_jax.files import format_json, write_atomically
from uoe_jax.model import param_shapes
from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.runs.folder import CHECKPOINTS, read_origin
from uoe_jax.runs.state import check_buffers, first_mean
from uoe_jax.runs.stored import run_folder
from uoe_jax.stores.mirror import named
from uoe_jax.train.peers import is_primary
from uoe_jax.train.subject import MakeSubject, Subject, whole_model
from uoe_jax.tree import named_leaves, replace_leaves
from uoe_jax.validation import read_config
from uoe_jax.weights import ROTATED

RECORD = "init_from.json"  # in the folder of a run that was started from another
_PARAMS, _BUFFERS = "params.", "buffers."


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run's first parameters come from, and which of them do."""

    source: Path
    step: int  # of the source's checkpoint
    partial: bool
    digest: str  # of the checkpoint's manifest
    loaded: tuple[str, ...]  # parameters that match in name, shape and meaning
    fresh: tuple[str, ...]  # those of the new model that don't

    def describe(self) -> str:
        """Return what is loaded and what isn't, as one line."""
        text = f"{_count(self.loaded)} from step {self.step} of {self.source}"
        listed = f" ({_listed(self.loaded)})" if self.fresh else ""
        fresh = f"; {_count(self.fresh)} fresh ({_listed(self.fresh)})"
        return f"starting with {text}{listed}{fresh if self.fresh else ''}"


def start_from(
    source: Path, config: ExperimentConfig, run_dir: Path, *, partial: bool = False
) -> MakeSubject:
    """Return what makes a model with the parameters of another run's newest checkpoint.

    With `partial` those that match in name, shape and the heads that they are of are
    loaded, the others are fresh; so are the optimizer and the step. A run that has
    trained already goes on as it is.

    Raises CheckpointError, before anything is written, if parameters don't match (with
    both shapes), none does, or the source can't be read; ConfigError if the run in
    `run_dir` didn't start so, or if the source had another tokenizer.
    """
    source = run_folder(source, "source")
    run_dir = run_folder(run_dir, "run_dir", writes=True)
    record = read_origin(run_dir / RECORD, {"source": str})
    asked = {"source": named(source.absolute()), "partial": partial}
    begun = bool(Checkpoints(run_dir / CHECKPOINTS).steps())
    if begun or record is not None:
        had = {key: (record or {}).get(key) for key in asked}
        if had != asked:
            was = f"from {had['source']}" if record else "with fresh parameters"
            raise ConfigError(
                f"{run_dir} was started {was}, partial {bool(had['partial'])}: leave "
                "--init-from as it was, or choose another --run-dir"
            )
    if begun:
        return whole_model
    start = _plan(source, config, partial)
    compare_tokenizers(source, config, partial=partial)
    if record is not None and record.get("digest") != start.digest:
        raise ConfigError(
            f"{run_dir} was started from step {record.get('step')} of {source}, which "
            "has changed since; choose another --run-dir"
        )
    return _make_subject(start, run_dir)


def recorded_start(run_dir: Path, config: ExperimentConfig) -> MakeSubject:
    """Return how the run in a folder starts: fresh, or as its record says."""
    run_dir = run_folder(run_dir, "run_dir", writes=True)
    record = read_origin(run_dir / RECORD, {"source": str})
    if record is None:
        return whole_model
    source, partial = Path(str(record.get("source"))), record.get("partial") is True
    return start_from(source, config, run_dir, partial=partial)


def _plan(source: Path, config: ExperimentConfig, partial: bool) -> Start:
    """Compare the source's parameters with the model's; raise CheckpointError."""
    store = Checkpoints(source / CHECKPOINTS)
    steps = store.steps()
    if not steps:
        raise CheckpointError(
            f"{source} holds no checkpoint; give the folder of a run that has trained"
        )
    manifest = store.about(steps[-1])
    saved = {
        name.removeprefix(_PARAMS): tuple(array["shape"])
        for name, array in manifest["arrays"].items()
        if name.startswith(_PARAMS)
    }
    model = {name: leaf.shape for name, leaf in param_shapes(config.model).items()}
    heads = _other_heads(read_config(source).model, config.model, list(model))
    problems = heads | _problems(saved, model)
    loaded = tuple(name for name in model if name not in problems)
    if not loaded or (not partial and problems):
        raise CheckpointError(_mismatch(source, problems, bool(loaded)))
    return Start(
        source=source,
        step=steps[-1],
        partial=partial,
        digest=content_hash(manifest),
        loaded=loaded,
        fresh=tuple(name for name in model if name not in loaded),
    )


def compare_tokenizers(
    source: Path, config: ExperimentConfig, *, partial: bool = False
) -> None:
    """Raise ConfigError where the source's tokenizer is another: ids mean other words.

    Of a `partial` start it is a warning: what is loaded may be meant to be trained
    anew.
    """
    before = read_record(source)
    if before is None or before.tokenizer_identity is None:  # images, or an older run
        return
    after = record_of(prepare(config))
    if before.tokenizer_identity == after.tokenizer_identity:
        return
    fix = f"set --data.tokenizer {before.content['tokenizer']['name']}"
    if before.tokenizer_text is not None:
        fix = f"set --data.tokenizer {source / TOKENIZER}"
    elif before.tokenizer_identity == "ids":
        fix = "give it token ids of the same vocabulary"
    text = (
        f"{source} was trained with another tokenizer than the new run's data, so that "
        f"the same ids mean other words; {fix}"
    )
    if not partial:
        raise ConfigError(text)
    note_once(f"warning: {text}")


def _is_of(buffer: str, loaded: Sequence[str]) -> bool:
    """Whether a buffer is of parameters that are loaded: a router's, or rotated."""
    folder, _, last = buffer.rpartition(".")
    if last != "rotary_pairs":
        return any(name.startswith(f"{folder}.") for name in loaded)
    return any(f"{folder}.{name}" in loaded for name in ROTATED)


def _problems(saved: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, str]:
    """Return by name which parameters differ in shape, or are one model's alone."""
    shape = lambda shapes, name: list(shapes[name]) if name in shapes else "absent"
    return {
        name: f"is {shape(saved, name)} there, {shape(model, name)} here"
        for name in [*model, *(n for n in saved if n not in model)]
        if saved.get(name) != model.get(name)
    }


def _other_heads(
    there: ModelConfig, here: ModelConfig, names: Sequence[str]
) -> dict[str, str]:
    """Return by name which queries and keys are of heads that are rotated otherwise.

    Narrow heads keep pairs of a wide one with their frequencies (`model.widths`), so a
    head of four numbers isn't four numbers of a head of eight, whose shape is the same.
    """
    if there.head_dim == here.head_dim or not (there.rotates and here.rotates):
        return {}
    told = f"keeps pairs of a head of {there.head_dim} there, of {here.head_dim} here"
    rotated = tuple(f"attention.{name}" for name in ROTATED)
    return {name: told for name in names if name.endswith(rotated)}


def _mismatch(source: Path, problems: Mapping[str, str], some: bool) -> str:
    told = [f"{name} {problem}" for name, problem in problems.items()]
    fix = "--init-partial loads the others" if some else "none matches: try another run"
    return (
        f"{len(problems)} parameters of {source} aren't this model's: "
        f"{_listed(told, '; ', 12)}; {fix}"
    )


def _listed(names: Sequence[str], separator: str = ", ", limit: int = 6) -> str:
    shown = separator.join(names[:limit])
    more = len(names) - limit
    return f"{shown}{separator}and {more} more" if more > 0 else shown


def _count(names: tuple[str, ...]) -> str:
    return f"{len(names)} parameter{'' if len(names) == 1 else 's'}"


def _make_subject(start: Start, run_dir: Path) -> MakeSubject:
    def make(
        config: ExperimentConfig,
        optimizer: optax.GradientTransformationExtraArgs,
        mesh: Mesh,
    ) -> Subject:
        subject = whole_model(config, optimizer, mesh)
        layout, state = subject.layout, subject.state
        wanted = {f"{_PARAMS}{name}" for name in start.loaded}
        # The balance biases of routers that are loaded come along where they fit, and
        # the pairs of queries and keys that are.
        store = Checkpoints(start.source / CHECKPOINTS)
        saved = store.about(start.step)["arrays"]
        leaves = named_leaves(state)
        wanted |= {
            name
            for name, leaf in leaves.items()
            if name.startswith(_BUFFERS)
            and saved.get(name, {}).get("shape") == list(leaf.shape)
            and _is_of(name.removeprefix(_BUFFERS), start.loaded)
        }
        template = {name: leaves[name] for name in leaves if name in wanted}
        _, arrays, _ = store.restore(template, step=start.step)
        check_buffers(start.source, config.model, arrays)
        typed = {n: np.asarray(a).astype(leaves[n].dtype) for n, a in arrays.items()}
        placed = layout.place(layout.to_memory(typed))
        if is_primary():
            record = {
                **dataclasses.asdict(start),
                "source": named(start.source.absolute()),
            }
            text = format_json(record, indent=2) + "\n"
            write_atomically(run_dir / RECORD, text)
        state = replace_leaves(state, placed)
        if state.ema is not None:
            mean = first_mean(config.optim, state.params)
            state = dataclasses.replace(state, ema=mean)
        return dataclasses.replace(subject, state=state, note=start.describe())

    return make
