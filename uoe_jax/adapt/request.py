"""What a run is to be adapted to, and the experiment that follows from it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax

from uoe_jax.adapt.config import AdapterConfig, check_adapter
from uoe_jax.adapt.config import Path as Forward
from uoe_jax.config import DataConfig, ExperimentConfig, LayoutConfig, MeshConfig
from uoe_jax.data.record import with_run_tokenizer
from uoe_jax.errors import ConfigError
from uoe_jax.fields import Checked, Count, NotNegative, Seed, Whole, check_ranges
from uoe_jax.partition.mesh import mesh_for
from uoe_jax.runs.load import LoadedRun
from uoe_jax.validation import validate


@dataclass(frozen=True, kw_only=True)
class AdaptRequest(Checked):
    """What a run is adapted to, and how."""

    adapter: AdapterConfig | None = None  # None: the loaded adapter's
    load: Path | None = None  # start from this adapter, ours or PEFT's LoRA of a Llama
    # File, folder, glob, tfds:NAME or a built-in source; None: as the run's.
    data: str | None = None
    steps: Whole = 300  # 0: only measure and merge what was loaded
    learning_rate: NotNegative = 3e-3
    batch_size: Count | None = None  # None: the run's
    which: Literal["last", "best"] = "last"  # checkpoint of the run
    path: Forward = "auto"
    seed: Seed = 0  # of the factors and the order of the data
    eval_batches: Count = 8
    mesh: MeshConfig | None = None  # None: as many devices as divide a pass
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    merge: bool = False  # also write a run with the deltas in its weights


def check_request(request: AdaptRequest) -> None:
    """Raise ConfigError for a request that can't be carried out."""
    check_ranges(request)
    steps, load = request.steps, request.load
    if (request.adapter is None) == (load is None):
        raise ConfigError(
            "a loaded adapter keeps its own config: give either a config or a folder"
        )
    if request.adapter is not None:
        check_adapter(request.adapter)
    if steps == 0 and load is None:
        raise ConfigError(f"steps is {steps}; 0 is for merging an adapter from --load")


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
            "max_bytes": None,
        }
    if request.batch_size is not None:
        changes["batch_size"] = request.batch_size
    new_data: DataConfig = dataclasses.replace(config.data, **changes)
    if data is not None:
        # The vocabulary the model was trained with, not one of the new text.
        new_data = with_run_tokenizer(config, new_data, run.folder)
    optim = dataclasses.replace(
        config.optim,
        learning_rate=request.learning_rate,
        warmup_steps=min(config.optim.warmup_steps, max(request.steps // 10, 1)),
        weight_decay=0.0,
    )
    budget = dataclasses.replace(
        config.train,
        steps=request.steps,
        seed=request.seed,
        eval_batches=request.eval_batches,
        max_seconds=None,  # that was for the whole model
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
