"""Wikipedia bytes, then Python source: bits per byte against adapter parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.e006_adapters.config import (
    FILE,
    RANKS,
    RATES,
    Settings,
    adapter,
    base_experiment,
)
from experiments.e006_adapters.curves import (
    Curve,
    Results,
    over_stack,
    solve,
    start_ranks,
)
from experiments.e006_adapters.data import python_source, wikipedia
from experiments.shared.stack import first_state, train_at_once, with_rate
from uoe_jax.adapt import Adapters, apply_adapted, init_adapters
from uoe_jax.adapt.subject import adapter_layout, adapter_objective
from uoe_jax.bench.record import made_with
from uoe_jax.config import ExperimentConfig, MeshConfig, OptimConfig
from uoe_jax.model import make_model
from uoe_jax.optim import make_optimizer
from uoe_jax.partition.mesh import make_mesh
from uoe_jax.runs.state import layout_of
from uoe_jax.train.step import batch_loss, make_step
from uoe_jax.train.subject import freeze_params

Tree = Any
BASE_RATE, BASE_SEED = 1e-3, 7


def windows(data: jax.Array, starts: jax.Array, length: int) -> dict[str, jax.Array]:
    """The batch whose rows start at the given bytes."""
    rows = data[starts[:, None] + jnp.arange(length + 1)[None]].astype(jnp.int32)
    whole = jnp.ones((starts.shape[0], length), jnp.int32)
    mask = whole.astype(jnp.float32)
    batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:]}
    return batch | {"mask": mask, "segments": whole}


class Task:
    """A model's static half, and its loss as a function of parameters."""

    def __init__(self, config: ExperimentConfig):
        self.config = dataclasses.replace(config, mesh=MeshConfig(data=1))
        self.mesh = make_mesh(self.config.mesh)
        model = make_model(config.model, jax.random.key(0))
        self.graphdef, self.params, self.buffers = nnx.split(model, nnx.Param, ...)

    def objective(self, params: Tree, batch: Any) -> jax.Array:
        """Mean loss in nats a byte."""
        model = nnx.merge(self.graphdef, params, self.buffers)
        return batch_loss(model, batch, self.config)[0].objective / batch["mask"].size

    def training(self, steps: int) -> ExperimentConfig:
        """Adam with warm-up and cosine decay, its rate given with the state."""
        optim = OptimConfig(
            learning_rate=1.0, warmup_steps=max(1, steps // 20), weight_decay=0.0
        )
        train = dataclasses.replace(self.config.train, steps=steps)
        return dataclasses.replace(self.config, optim=optim, train=train)


class Run(NamedTuple):
    """What one run of a stack is trained on, and how long."""

    data: jax.Array
    rate: jax.Array
    seed: jax.Array
    steps: int
    batch: int


def fit(task: Task, params: Tree, run: Run, start: Adapters | None = None) -> Tree:
    """All steps, the project's own, in one scan: of the parameters or of adapters."""
    config, length = task.training(run.steps), task.config.model.max_seq_len
    optimizer = with_rate(make_optimizer(config.optim, run.steps))
    make = functools.partial(make_step, config, task.graphdef, optimizer, task.mesh)
    if start is None:
        step, weights, buffers, frozen = make(), params, task.buffers, None
    else:
        whole = layout_of(config, task.mesh)
        frozen = {"params": params, "buffers": task.buffers, "scales": start.scales}
        objective = adapter_objective(start, whole, frozen, "auto")
        step = make(adapter_layout(start, whole), objective)
        weights, buffers = start.weights, start.anchor
    state = first_state(weights, buffers, optimizer, run.rate)

    def batch(number: jax.Array) -> dict[str, jax.Array]:
        key = jax.random.fold_in(jax.random.key(run.seed), number)
        last = run.data.shape[0] - length - 1
        starts = jax.random.randint(key, (run.batch,), 0, last)
        return windows(run.data, starts, length)

    return train_at_once(step, state, batch, run.steps, frozen)


def bits_per_byte(
    objective: Callable[[Tree, Any], jax.Array],
    tree: Tree,
    data: jax.Array,
    length: int,
) -> jax.Array:
    """Mean bits over 512 windows spread evenly; every byte but the first is scored."""
    starts = jnp.linspace(0, data.shape[0] - length - 2, 512).astype(jnp.int32)
    parts = starts.reshape(-1, 32)
    one = lambda starts: objective(tree, windows(data, starts, length))
    return jnp.mean(jax.lax.map(one, parts)) / jnp.log(2.0)


def train_base(task: Task, out: Path, given: Settings) -> tuple[Tree, float]:
    """The Wikipedia model, from a file if an earlier call left it there."""
    length, file = task.config.model.max_seq_len, out / "base.npz"
    leaves, tree = jax.tree.flatten(task.params)
    train, valid = wikipedia(given.tiny)
    if file.exists():
        with np.load(file) as saved:
            leaves = [jnp.asarray(saved[f"p{i}"]) for i in range(len(leaves))]
        params = jax.tree.unflatten(tree, leaves)
    else:
        rate, seed = jnp.float32(BASE_RATE), jnp.int32(BASE_SEED)
        sizes = (given.base_steps, given.base_batch)
        train_all = jax.jit(lambda p, d: fit(task, p, Run(d, rate, seed, *sizes)))
        params = train_all(task.params, jnp.asarray(train))
        np.savez(file, **{f"p{i}": a for i, a in enumerate(jax.tree.leaves(params))})
    score = jax.jit(lambda p, d: bits_per_byte(task.objective, p, d, length))
    return params, float(score(params, jnp.asarray(valid)))


def adapter_curve(
    name: str, task: Task, base: Tree, data: tuple[Any, Any], given: Settings
) -> Curve:
    """All ranks of one method."""
    length, frozen = task.config.model.max_seq_len, freeze_params(base, task.config)
    make = lambda rank, key: init_adapters(base, adapter(name, rank), key)
    starts, sizes = start_ranks(make, RANKS)

    def one(item: Any, frozen: Tree, train: jax.Array, valid: jax.Array) -> jax.Array:
        start, rate, seed = item

        def objective(weights: Tree, batch: Any) -> jax.Array:
            adapters = start.with_weights(weights)
            call = functools.partial(apply_adapted, task.objective, training=True)
            return call(frozen, adapters, batch, path="auto")

        run = Run(train, rate, seed, given.steps, given.batch)
        weights = fit(task, frozen, run, start)
        return bits_per_byte(objective, weights, valid, length)

    run = over_stack(one, given.together, frozen, *data)
    rates = RATES["adapter"]
    return Curve(
        name=name, metric="bpb", rates=rates, sizes=sizes, run=run, starts=starts
    )


def full_curve(task: Task, base: Tree, data: tuple[Any, Any], given: Settings) -> Curve:
    """Full fine-tuning: the ceiling."""
    length = task.config.model.max_seq_len

    def one(item: Any, base: Tree, train: jax.Array, valid: jax.Array) -> jax.Array:
        _, rate, seed = item
        params = fit(task, base, Run(train, rate, seed, given.steps, given.batch))
        return bits_per_byte(task.objective, params, valid, length)

    run = over_stack(one, given.together, base, *data)
    sizes = {0: sum(a.size for a in jax.tree.leaves(base))}
    return Curve(name="full", metric="bpb", rates=RATES["full"], sizes=sizes, run=run)


def run(out: Path, given: Settings) -> None:
    """Train the base model, then every curve that has no result yet."""
    out.mkdir(parents=True, exist_ok=True)
    results, config = Results(out / FILE, "lm"), base_experiment(given.tiny)
    task = Task(config)
    base, wiki = train_base(task, out, given)
    data = tuple(jnp.asarray(part) for part in python_source(config))
    length = config.model.max_seq_len
    score = jax.jit(functools.partial(bits_per_byte, task.objective, length=length))
    about = {
        **made_with(),
        "config": dataclasses.asdict(config),
        "settings": dataclasses.asdict(given),
        "base_params": sum(a.size for a in jax.tree.leaves(base)),
        "base_bpb_wikipedia": wiki,
        "base_bpb_python": float(score(base, data[1])),
        "python_bytes": [int(part.shape[0]) for part in data],
    }
    results.put("about", about)
    print(
        f"base: {wiki:.4f} bpb on Wikipedia, {about['base_bpb_python']:.4f} on Python",
        flush=True,
    )
    for name in given.curves:
        if name in results.done:
            continue
        if name == "full":
            solve(full_curve(task, base, data, given), results)
        else:
            solve(adapter_curve(name, task, base, data, given), results)
