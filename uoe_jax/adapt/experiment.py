"""The experiment that adapting a run is: its model, other data, a budget of its own."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from uoe_jax.adapt.request import AdaptRequest
from uoe_jax.config import DataConfig, ExperimentConfig, MeshConfig
from uoe_jax.data.record import with_run_tokenizer
from uoe_jax.data.source import without_unread
from uoe_jax.partition.mesh import mesh_for
from uoe_jax.runs.load import LoadedRun
from uoe_jax.validation import validate


def adapted_experiment(run: LoadedRun, request: AdaptRequest) -> ExperimentConfig:
    """Return a run's experiment on other data: its model and tokenizer, a new budget.

    Raises ConfigError for a value that can't be.
    """
    config, data = run.config, request.data
    changes: dict[str, Any] = {}
    if data is not None:
        built_in = data in ("stdlib", "digits")
        changes = {
            "source": data if built_in else "auto",
            "path": None if built_in else data,
            "mix": None,
            "max_bytes": None,
        }
    if request.batch_size is not None:
        changes["batch_size"] = request.batch_size
    new_data: DataConfig = dataclasses.replace(config.data, **changes)
    if data is not None:
        new_data = without_unread(new_data, config.model.kind)
        # The vocabulary the model was trained with, not one of the new text.
        new_data = with_run_tokenizer(config, new_data, run.folder)
    optim = dataclasses.replace(
        config.optim,
        learning_rate=request.learning_rate,
        warmup_steps=min(config.optim.warmup_steps, max(request.steps // 10, 1)),
        weight_decay=0.0,
        ema_decay=0.0,
    )
    budget = dataclasses.replace(
        config.train,
        steps=request.steps,
        seed=request.seed,
        eval_batches=request.eval_batches,
        max_seconds=None,  # these were for the whole model
        distill_from=None,
        top_k_warmup_steps=0,
        profile=False,
    )
    config = dataclasses.replace(
        config,
        data=new_data,
        optim=optim,
        train=budget,
        layout=request.layout,
        mesh=request.mesh or MeshConfig(),
    )
    validate(config)
    if request.mesh is None:
        # The run's own mesh was for other devices: as many of these as divide a pass.
        rows = config.data.batch_size // config.train.accumulate
        mesh = MeshConfig(data=math.gcd(rows, jax.device_count()))
        config = dataclasses.replace(config, mesh=mesh)
    mesh_for(config)
    return config
