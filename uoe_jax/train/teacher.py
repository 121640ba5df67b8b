"""A frozen run that another one learns from, beside its data (Hinton et al. 2015).

Which checkpoint it is stands in the learning run's folder, so that a run that goes on
has the same teacher; the teacher's weights are never saved there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PyTree

from uoe_jax.config import ExperimentConfig, ModelConfig, content_hash
from uoe_jax.errors import CheckpointError, ConfigError
from uoe_jax.files import format_json, write_atomically
from uoe_jax.hardware.count import flops_per_token
from uoe_jax.model import split_model
from uoe_jax.rules import NO_RULES
from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.runs.folder import CHECKPOINTS, CONFIG, read_origin
from uoe_jax.runs.load import ADAPTATION, read_weights
from uoe_jax.runs.state import layout_of
from uoe_jax.runs.stored import run_folder
from uoe_jax.train.initial import compare_tokenizers
from uoe_jax.train.loss import Taught, output_layer
from uoe_jax.train.step import example_weights, hidden_states, loss_tokens
from uoe_jax.train.subject import Subject, freeze_params
from uoe_jax.tree import fill_leaves
from uoe_jax.validation import read_config

RECORD = "distill_from.json"  # in the folder of a run that learns from another
_RECORDED = {"source": str, "step": int, "digest": str}


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A run's checkpoint that another run learns from."""

    folder: Path
    step: int
    digest: str  # of the checkpoint's manifest
    model: ModelConfig

    def describe(self, config: ExperimentConfig) -> str:
        """Return who teaches and how much it counts, as one line."""
        train = config.train
        return (
            f"learning from step {self.step} of {self.folder}: weight "
            f"{train.distill_weight:g}, temperature {train.distill_temperature:g}"
        )

    def record(self, run_dir: Path) -> None:
        """Write which checkpoint it is into the folder of the run that learns."""
        about = {"source": str(self.folder.absolute())}
        about |= {"step": self.step, "digest": self.digest}
        write_atomically(run_dir / RECORD, format_json(about, indent=2) + "\n")


def find_teacher(config: ExperimentConfig, run_dir: Path) -> Teacher | None:
    """Return the run that `train.distill_from` names, None where it names none.

    Nothing of its weights is read. Raises ConfigError for a run that can't teach this
    one, or that isn't the one this run began with; CheckpointError where it has no
    checkpoint.
    """
    if config.train.distill_from is None:
        return None
    folder = run_folder(config.train.distill_from, "train.distill_from").expanduser()
    model = _check_kind(folder, run_dir, config)
    store = Checkpoints(folder / CHECKPOINTS)
    steps, record = store.steps(), read_origin(run_dir / RECORD, _RECORDED)
    if not steps:
        raise CheckpointError(
            f"train.distill_from: {folder} holds no checkpoint; give the folder of a "
            "run that has trained"
        )
    step = steps[-1] if record is None else record["step"]
    digest = content_hash(store.about(step)) if step in steps else None
    if digest is None or (record is not None and record["digest"] != digest):
        raise ConfigError(
            f"{run_dir} learns from step {step} of {record and record['source']}, and "
            f"{folder} doesn't hold that checkpoint any more; put it back, or choose "
            "another --run-dir"
        )
    compare_tokenizers(folder, config)
    return Teacher(folder=folder, step=step, digest=digest, model=model)


def _check_kind(folder: Path, run_dir: Path, config: ExperimentConfig) -> ModelConfig:
    """Return the model of a run that may teach; raise ConfigError for another."""
    name = f"train.distill_from: {folder}"
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"{name} isn't a run: it has no {CONFIG}; give a folder that `uoe train` "
            "or `uoe import` wrote"
        )
    if (folder / ADAPTATION).is_file():
        raise ConfigError(
            f"{name} is the run of an adapter, not of a whole model; give its "
            f"{folder / 'merged'}, which `uoe adapt --merge` writes"
        )
    if folder.resolve() == Path(run_dir).resolve():
        raise ConfigError(
            f"{name} is the run itself; give another one, such as a copy of what it "
            "was made from"
        )
    model, own = read_config(folder).model, config.model
    if model.kind != "decoder":
        raise ConfigError(
            f"{name} is a run of model.kind {model.kind!r}; only a decoder teaches one"
        )
    if model.vocab_size != own.vocab_size:
        raise ConfigError(
            f"{name} has a vocabulary of {model.vocab_size} tokens and this model one "
            f"of {own.vocab_size}; a teacher needs the same tokens"
        )
    if model.max_seq_len < config.seq_len:
        raise ConfigError(
            f"{name} takes at most {model.max_seq_len} tokens and rows are "
            f"{config.seq_len} long; set data.seq_len {model.max_seq_len}"
        )
    return model


def with_teacher(
    subject: Subject, teacher: Teacher, config: ExperimentConfig, mesh: Mesh
) -> Subject:
    """Return a subject whose objective learns from a teacher too.

    The teacher is laid out on the mesh as the model that learns is, computes in its
    dtype, and drops nothing out.
    """
    compute = config.model.compute_dtype
    model = dataclasses.replace(
        teacher.model, compute_dtype=compute, remat="none", float8="none"
    )
    # Rules are about the weights of the model that learns.
    layout_config = dataclasses.replace(config.layout, rules=NO_RULES)
    config = dataclasses.replace(config, model=model, layout=layout_config)
    layout = layout_of(config, mesh)
    graphdef, params, buffers = _read(teacher, config)
    parallel = layout.parallel

    def teach(frozen: PyTree, batch: Mapping[str, Any]) -> Taught:
        given = frozen["params"], frozen["buffers"]
        model = nnx.merge(graphdef, parallel.gather_params(given[0]), given[1])
        x, _ = hidden_states(
            model, batch, config, axis_name=parallel.token_axes, parallel=parallel
        )
        weights = example_weights(batch)
        x = loss_tokens(x, batch["targets"], weights, parallel)[0]
        return Taught(x.reshape(-1, x.shape[-1]), *output_layer(model))

    frozen = {
        "params": layout.place(layout.to_memory(params)),
        "buffers": layout.place(buffers),
    }
    objective = dataclasses.replace(
        subject.objective,
        teach=teach,
        frozen_specs={
            "params": layout.spec_tree(frozen["params"]),
            "buffers": layout.spec_tree(buffers),
        },
    )
    forward = flops_per_token(model, config.seq_len).forward
    return dataclasses.replace(
        subject,
        objective=objective,
        frozen=frozen,
        flops_per_token=subject.flops_per_token + forward,
    )


def _read(
    teacher: Teacher, config: ExperimentConfig
) -> tuple[nnx.GraphDef, PyTree, PyTree]:
    """Return the teacher's static half and its arrays on the host."""
    own = read_config(teacher.folder)
    saved = read_weights(teacher.folder, own, step=teacher.step)
    arrays = {name: np.asarray(array) for name, array in saved.arrays.items()}
    state = fill_leaves(saved.template, arrays)
    return (
        split_model(config.model, 0)[0],
        freeze_params(state["params"], config),
        state["buffers"],
    )
