"""A run adapted to other data: the adapter trained, measured, saved and merged."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from uoe_jax.adapt.adapters import Adapters, count_adapter_params, init_adapters
from uoe_jax.adapt.config import AdapterConfig, check_adapter
from uoe_jax.adapt.config import Path as Forward
from uoe_jax.adapt.files import WEIGHTS, load_adapters, read_config, save_adapters
from uoe_jax.adapt.foreign import read_peft
from uoe_jax.adapt.merge import merge
from uoe_jax.adapt.place import llama_names, place_modules
from uoe_jax.adapt.plot import plot_adaptation
from uoe_jax.adapt.session import Note, Session
from uoe_jax.checkpoint import Checkpoints, snapshot
from uoe_jax.config import DataConfig, ExperimentConfig, MeshConfig, ModelConfig
from uoe_jax.data import Prepared
from uoe_jax.data.record import record_of, with_run_tokenizer
from uoe_jax.errors import ConfigError
from uoe_jax.evaluate import LoadedRun, load_run, run_dataset
from uoe_jax.files import write_atomically
from uoe_jax.optim import make_optimizer
from uoe_jax.partition.mesh import make_mesh
from uoe_jax.train.clock import Progress
from uoe_jax.train.run_dir import CHECKPOINTS, open_run_dir, write_environment
from uoe_jax.train.state import TrainState
from uoe_jax.validation import validate

REPORT, CURVE, MERGED = "adapt.json", "adapt.png", "merged"

Which = Literal["last", "best"]


def adapted_experiment(
    run: LoadedRun,
    *,
    data: str | None,
    steps: int,
    learning_rate: float,
    batch_size: int | None,
    seed: int,
) -> ExperimentConfig:
    """Return a run's experiment on other data: its model and tokenizer, a new budget.

    `data` is a file, folder, glob, tfds:NAME or a built-in source; None: as the run's.
    """
    config = run.config
    changes: dict[str, Any] = {}
    if data is not None:
        built_in = data in ("stdlib", "digits")
        changes = {
            "source": data if built_in else "auto",
            "path": None if built_in else data,
            "max_bytes": None,
        }
    if batch_size is not None:
        changes["batch_size"] = batch_size
    new_data: DataConfig = dataclasses.replace(config.data, **changes)
    if data is not None:
        # The vocabulary the model was trained with, not one of the new text.
        new_data = with_run_tokenizer(config, new_data, run.folder)
    optim = dataclasses.replace(
        config.optim,
        learning_rate=learning_rate,
        warmup_steps=min(config.optim.warmup_steps, max(steps // 10, 1)),
        weight_decay=0.0,
    )
    train = dataclasses.replace(config.train, steps=max(steps, 1), seed=seed)
    config = dataclasses.replace(
        config, data=new_data, optim=optim, train=train, mesh=MeshConfig()
    )
    validate(config)
    # The run's own mesh was for other devices: as many of these as divide a pass.
    rows = config.data.batch_size // config.train.accumulate
    data_axis = math.gcd(rows, jax.device_count())
    return dataclasses.replace(config, mesh=MeshConfig(data=data_axis))


def adapt_run(
    folder: Path,
    out: Path,
    adapter: AdapterConfig,
    *,
    data: str | None = None,
    steps: int = 300,
    learning_rate: float = 3e-3,
    batch_size: int | None = None,
    load: Path | None = None,
    merged: bool = False,
    which: Which = "last",
    path: Forward = "auto",
    seed: int = 0,
    eval_batches: int = 8,
    note: Note = print,
) -> dict[str, Any]:
    """Train an adapter of a run into `out` and return the report.

    `load` starts from an adapter that was saved here, or PEFT's LoRA of a Llama; with
    `steps` 0 nothing is trained. `merged` also writes a run with the deltas in its
    weights into OUT/merged; the run itself is never touched.

    Raises ConfigError, DataError or CheckpointError before anything compiles,
    NonFiniteError when training diverges; then nothing is written.
    """
    check_adapter(adapter)
    if steps < 0 or (steps == 0 and load is None):
        raise ConfigError(f"steps is {steps}; 0 is for merging an adapter from --load")
    _check_out(out)
    run = load_run(folder, which=which)
    config = adapted_experiment(
        run,
        data=data,
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
    )
    graphdef, params, buffers = nnx.split(run.model, nnx.Param, ...)
    adapters, adapter = _start(load, params, adapter, seed)
    sets = (
        run_dataset(folder, run.config, "train", config.data),
        run_dataset(folder, run.config, "valid", config.data),
    )
    mesh = make_mesh(config.mesh)
    if mesh.size < jax.device_count():
        note(
            f"a pass of {config.data.batch_size // config.train.accumulate} rows goes "
            f"over {mesh.size} of {jax.device_count()} devices"
        )
    session = Session(config, graphdef, params, buffers, mesh, sets, eval_batches)
    report: dict[str, Any] = {
        "run": str(folder),
        "step": run.step,
        "method": adapter.method,
        "rank": adapter.rank,
        "data": sets[0].info["source"],
        "params": {
            "base": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "adapter": count_adapter_params(adapters),
        },
        "before": session.score(adapters),
    }
    if steps:
        adapters, training = session.train(adapters, path, note)
        report |= {**training, "after": session.score(adapters)}
    save_adapters(out, adapters, adapter, base=str(folder))
    report["file_bytes"] = (out / WEIGHTS).stat().st_size
    if merged:
        report["merged"] = _write_merged(
            run, config, (params, adapters, buffers), out, sets[0].prepared
        )
    write_atomically(out / REPORT, json.dumps(report, indent=2) + "\n")
    if steps:
        plot_adaptation(report, out / CURVE)
    return report


def _check_out(out: Path) -> None:
    """Raise ConfigError for a folder whose content would be mixed or lost."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; choose a folder with --out")
    for name, kind in ((WEIGHTS, "an adapter"), (MERGED, "a merged run")):
        if (out / name).exists():
            raise ConfigError(f"{out} holds {kind} already; choose another --out")


def _start(
    load: Path | None, params: PyTree, adapter: AdapterConfig, seed: int
) -> tuple[Adapters, AdapterConfig]:
    """Return a fresh adapter, or the one in a folder with its own config."""
    if load is None:
        return init_adapters(params, adapter, jax.random.key(seed)), adapter
    raw = read_config(load)
    if "uoe_jax" in raw:
        return load_adapters(load, params)
    adapters = place_modules(read_peft(load), params, llama_names)
    ranks = [plan.ranks[0] for plan in adapters.plans]
    names = tuple(plan.name for plan in adapters.plans)
    config = AdapterConfig(
        method="lora",
        rank=max(ranks),
        rank_pattern=dict(zip(names, ranks, strict=True)),
        alpha=float(max(ranks)),
        targets=names,
        use_dora=any(plan.dora for plan in adapters.plans),
    )
    return adapters, config


def _write_merged(
    run: LoadedRun,
    config: ExperimentConfig,
    state: tuple[PyTree, Adapters, PyTree],
    out: Path,
    prepared: Prepared,
) -> str:
    """Write a run whose weights have the deltas in them, added in float32."""
    params, adapters, buffers = state
    merged = jax.jit(lambda p, a: merge(p, a).params)(params, adapters)
    model: ModelConfig = run.config.model
    name = f"{run.config.name}-merged"
    config = dataclasses.replace(config, name=name, model=model, mesh=MeshConfig())
    folder = out / MERGED
    write_run(folder, config, merged, buffers, run.step, prepared, merged_from=str(out))
    return str(folder)


def write_run(
    folder: Path,
    config: ExperimentConfig,
    params: PyTree,
    buffers: PyTree,
    step: int,
    prepared: Prepared | None = None,
    **about: Any,
) -> None:
    """Write a run of one checkpoint with a fresh optimizer; `about` goes into env.json.

    Raises what `open_run_dir` does for a folder that is in use.
    """
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = TrainState(
        step=jnp.int32(step),
        params=params,
        opt_state=optimizer.init(params),
        buffers=buffers,
        bad_steps=jnp.int32(0),
    )
    data = None if prepared is None else record_of(prepared)
    with open_run_dir(folder, config, data=data):
        write_environment(folder, about)
        checkpoints = Checkpoints(folder / CHECKPOINTS)
        described = dataclasses.asdict(config)
        checkpoints.save(step, snapshot(state), described, Progress().as_json())
        checkpoints.close()
