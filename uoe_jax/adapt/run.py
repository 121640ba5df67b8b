"""A run adapted to other data: the adapter trained, measured, saved and merged."""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PyTree

from uoe_jax.adapt.adapters import Adapters, count_adapter_params, init_adapters
from uoe_jax.adapt.apply import adapted_params
from uoe_jax.adapt.config import AdapterConfig, check_adapter
from uoe_jax.adapt.config import Path as Forward
from uoe_jax.adapt.files import WEIGHTS, load_adapters, read_config, save_adapters
from uoe_jax.adapt.foreign import llama_names, place_modules, read_peft
from uoe_jax.adapt.merge import merge
from uoe_jax.adapt.plot import plot_adaptation
from uoe_jax.adapt.step import freeze_params, init_adapt_state, make_adapt_step
from uoe_jax.checkpoint import Checkpoints, snapshot
from uoe_jax.config import DataConfig, ExperimentConfig, MeshConfig, ModelConfig
from uoe_jax.data import Dataset, make_dataset, prefetch
from uoe_jax.errors import ConfigError
from uoe_jax.evaluate import LoadedRun, load_run
from uoe_jax.integrity import write_atomically
from uoe_jax.optim import make_optimizer
from uoe_jax.partition.mesh import make_mesh, replicated, split_over_data
from uoe_jax.train.clock import Progress
from uoe_jax.train.run_dir import CHECKPOINTS, open_run_dir, write_environment
from uoe_jax.train.state import TrainState
from uoe_jax.train.validate import make_eval_step, run_validation
from uoe_jax.validation import validate

REPORT, CURVE, MERGED = "adapt.json", "adapt.png", "merged"

Which = Literal["last", "best"]
Note = Callable[[str], None]


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
        if config.data.tokenizer == "bpe":
            # The vocabulary the model was trained with, not one of the new text.
            prepared = make_dataset(config, "train").prepared
            changes["tokenizer"] = str(prepared.folder / "tokenizer.json")
    if batch_size is not None:
        changes["batch_size"] = batch_size
    new_data: DataConfig = dataclasses.replace(config.data, **changes)
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
    return config


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

    Raises ConfigError, DataError or CheckpointError before anything compiles.
    """
    check_adapter(adapter)
    if steps < 0 or (steps == 0 and load is None):
        raise ConfigError(f"steps is {steps}; 0 is for merging an adapter from --load")
    if (out / WEIGHTS).exists():
        raise ConfigError(f"{out} holds an adapter already; choose another --out")
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
    sets = make_dataset(config, "train"), make_dataset(config, "valid")
    mesh = make_mesh(config.mesh, batch_size=config.data.batch_size)
    session = _Session(config, graphdef, params, buffers, mesh, sets, eval_batches)
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
        report["merged"] = _write_merged(run, config, params, adapters, buffers, out)
    write_atomically(out / REPORT, json.dumps(report, indent=2) + "\n")
    if steps:
        plot_adaptation(report, out / CURVE)
    return report


def _start(
    load: Path | None, params: PyTree, adapter: AdapterConfig, seed: int
) -> tuple[Adapters, AdapterConfig]:
    """Return a fresh adapter, or the one in a folder with its own config."""
    if load is None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
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


class _Session:
    """A frozen model on a mesh, and what is measured of its adapters."""

    def __init__(
        self,
        config: ExperimentConfig,
        graphdef: nnx.GraphDef,
        params: PyTree,
        buffers: PyTree,
        mesh: Mesh,
        data: tuple[Dataset, Dataset],
        eval_batches: int,
    ):
        self.config, self.graphdef, self.mesh = config, graphdef, mesh
        self.params, self.eval_batches = params, eval_batches
        frozen = freeze_params(params, config)
        self.frozen, self.buffers = jax.device_put((frozen, buffers), replicated(mesh))
        self.data, self.valid = data
        self.eval_step = make_eval_step(config, graphdef, mesh)
        self.merged = jax.jit(adapted_params)

    def score(self, adapters: Adapters) -> dict[str, Any]:
        """Return loss, bits per byte and accuracy on the new validation split."""
        params = self.merged(self.params, adapters)
        found = run_validation(
            self.eval_step,
            jax.device_put(params, replicated(self.mesh)),
            self.buffers,
            self.valid,
            self.mesh,
            self.eval_batches,
        )
        return {k: found[k] for k in ("loss", "bits_per_byte", "accuracy")}

    def batch(self, step: int) -> dict[str, jax.Array]:
        """Return training batch number `step` as microbatches on the devices."""
        parts = self.config.train.accumulate
        split = {
            k: v.reshape(parts, v.shape[0] // parts, *v.shape[1:])
            for k, v in self.data.batch(step).items()
        }
        return jax.device_put(split, split_over_data(self.mesh, axis=1))

    def train(
        self, adapters: Adapters, path: Forward, note: Note
    ) -> tuple[Adapters, dict[str, Any]]:
        """Return the trained adapter, and what the training took."""
        config, steps = self.config, self.config.train.steps
        optimizer = make_optimizer(config.optim, steps)
        state = init_adapt_state(adapters, optimizer)
        state = jax.device_put(state, replicated(self.mesh))
        step_fn: Any = make_adapt_step(
            config, self.graphdef, adapters, optimizer, self.mesh, path=path
        )
        start = time.perf_counter()
        inputs = (self.frozen, self.buffers)
        compiled = step_fn.lower(state, *inputs, self.batch(0)).compile()
        compile_seconds = time.perf_counter() - start
        losses, tokens, shown = [], [], max(config.train.log_every, 1)
        pending = None
        start = time.perf_counter()
        with prefetch(self.batch, 0, steps) as batches:
            for number, batch in enumerate(batches, 1):
                state, metrics = compiled(state, *inputs, batch)
                # Read one step late, so that the devices never wait for it.
                pending, ready = metrics, pending
                if ready is not None:
                    losses.append(float(ready["loss"]))
                    tokens.append(int(ready["tokens"]))
                if number % shown == 0 and losses:
                    note(f"step {number}/{steps}  loss {losses[-1]:.4f}")
        assert pending is not None
        losses.append(float(pending["loss"]))
        tokens.append(int(pending["tokens"]))
        seconds = time.perf_counter() - start
        memory = compiled.memory_analysis()
        # Off the mesh: what follows takes the run's own, unplaced parameters too.
        weights = jax.tree.map(jnp.asarray, jax.device_get(state.params))
        trained = adapters.with_weights(weights)
        return trained, {
            "steps": steps,
            "losses": losses,
            "seconds": seconds,
            "compile_seconds": compile_seconds,
            "tokens_per_second": sum(tokens) / seconds,
            "memory_bytes": {
                "frozen_base": _bytes(self.frozen),
                "adapter": _bytes(state.params),
                "optimizer": _bytes(state.opt_state),
                "temporary": getattr(memory, "temp_size_in_bytes", None),
            },
            "skipped_steps": int(np.sum(~np.isfinite(losses))),
        }


def _bytes(tree: PyTree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes"))


def _write_merged(
    run: LoadedRun,
    config: ExperimentConfig,
    params: PyTree,
    adapters: Adapters,
    buffers: PyTree,
    out: Path,
) -> str:
    """Write a run whose weights have the deltas in them, added in float32."""
    merged = jax.jit(lambda p, a: merge(p, a).params)(params, adapters)
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = TrainState(
        step=jnp.int32(run.step),
        params=merged,
        opt_state=optimizer.init(merged),
        buffers=buffers,
        bad_steps=jnp.int32(0),
    )
    folder = out / MERGED
    model: ModelConfig = run.config.model
    config = dataclasses.replace(config, name=f"{run.config.name}-merged", model=model)
    with open_run_dir(folder, config):
        write_environment(folder, {"merged_from": str(out)})
        checkpoints = Checkpoints(folder / CHECKPOINTS)
        described = dataclasses.asdict(config)
        checkpoints.save(run.step, snapshot(state), described, Progress().as_json())
        checkpoints.close()
    return str(folder)
