"""Wikipedia bytes, then Python source: bits per byte against adapter parameters.

    python -m experiments.e006_adapters.lm --out OUT [--tiny]

One compiled program a curve: ranks are padded to the highest, where they train as if
they were alone, and every (rank, rate, seed) is one entry of a stack. Results are saved
after every stack; a second call goes on with what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import lzma
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.e006_adapters.config import (
    ADAPTERS,
    RANKS,
    RATES,
    SEEDS,
    adapter,
    as_dict,
    base_experiment,
)
from experiments.shared.stack import first_state, train_at_once, with_rate
from uoe_jax.adapt import (
    Adapters,
    apply_adapted,
    count_adapter_params,
    init_adapters,
)
from uoe_jax.adapt.subject import adapter_layout, adapter_objective
from uoe_jax.bench.record import made_with
from uoe_jax.config import ExperimentConfig, MeshConfig, OptimConfig
from uoe_jax.data import make_dataset
from uoe_jax.files import format_json
from uoe_jax.model import make_model
from uoe_jax.optim import make_optimizer
from uoe_jax.partition.mesh import make_mesh
from uoe_jax.runs.state import layout_of
from uoe_jax.train.step import batch_loss, make_step
from uoe_jax.train.subject import freeze_params

Tree = Any


def wikipedia(limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation bytes."""
    path = Path(os.environ["UOE_DATA_DIR"]) / "enwiki_plain_66MB.txt.xz"
    with lzma.open(path) as file:
        text = np.frombuffer(file.read(limit + 3_000_000), np.uint8)
    return text[:-3_000_000], text[-3_000_000:]


def python_source(config: ExperimentConfig) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation bytes of the built-in text."""
    splits = []
    for split in ("train", "valid"):
        tokens = make_dataset(config, split).prepared.array(split, "tokens")
        splits.append(np.asarray(tokens).astype(np.uint8))
    return splits[0], splits[1]


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


def fit(
    task: Task,
    params: Tree,
    run: Run,
    start: Adapters | None = None,
    path: Any = "auto",
) -> Tree:
    """All steps, the project's own, in one scan: of the parameters or of adapters."""
    config, length = task.training(run.steps), task.config.model.max_seq_len
    optimizer = with_rate(make_optimizer(config.optim, run.steps))
    make = functools.partial(make_step, config, task.graphdef, optimizer, task.mesh)
    if start is None:
        step, weights, buffers, frozen = make(), params, task.buffers, None
    else:
        whole = layout_of(config, task.mesh)
        frozen = {"params": params, "buffers": task.buffers, "scales": start.scales}
        objective = adapter_objective(start, whole, frozen, path)
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


class Results:
    """A JSON file of what is done, rewritten after every entry."""

    def __init__(self, path: Path):
        self.path = path
        self.done = json.loads(path.read_text()) if path.exists() else {}

    def put(self, key: str, value: Any) -> None:
        self.done[key] = value
        self.path.write_text(format_json(self.done, indent=1) + "\n")


def train_base(task: Task, args: argparse.Namespace) -> tuple[Tree, float]:
    """The Wikipedia model, from a file if an earlier call left it there."""
    length = task.config.model.max_seq_len
    file, names = args.base or args.out / "base.npz", jax.tree.leaves(task.params)
    train, valid = wikipedia(args.wiki_bytes)
    if file.exists():
        saved = np.load(file)
        leaves = [jnp.asarray(saved[f"p{i}"]) for i in range(len(names))]
        params = jax.tree.unflatten(jax.tree.structure(task.params), leaves)
    else:
        rate, seed = jnp.float32(args.base_rate), jnp.int32(7)
        run = jax.jit(
            lambda params, data: fit(
                task, params, Run(data, rate, seed, args.base_steps, args.base_batch)
            )
        )
        params = run(task.params, jnp.asarray(train))
        np.savez(file, **{f"p{i}": a for i, a in enumerate(jax.tree.leaves(params))})
    score = jax.jit(lambda p, d: bits_per_byte(task.objective, p, d, length))
    return params, float(score(params, jnp.asarray(valid)))


def over_stack(one: Callable[..., jax.Array], together: int, *shared: Any) -> Any:
    """Return stacked items -> results, one compilation; `shared` goes in as arguments.

    Arrays that a jitted function closes over would be constants of its program.
    """

    def compiled(size: int | None) -> Any:
        return jax.jit(
            lambda items, *shared: jax.lax.map(
                lambda item: one(item, *shared), items, batch_size=size
            )
        )

    side_by_side, in_turn = compiled(together), compiled(None)

    def run(items: Any) -> Any:
        if together > 1:
            try:
                return jax.block_until_ready(side_by_side(items, *shared))
            except Exception as error:  # a kernel that can't be batched, or memory
                print(f"in turn: {type(error).__name__}: {error}"[:400], flush=True)
        return in_turn(items, *shared)

    return run


def start_ranks(
    make: Callable[[jax.Array], Adapters], plans: dict[int, Adapters]
) -> dict[int, Adapters]:
    """Return every rank's first adapters, one a seed, padded to the highest rank.

    Drawn once at the highest rank and cut: the spread of the factors that depends on
    the rank (`peft`: all but the input's) is set to what their own rank asks for.
    """
    top = jax.device_get(jax.jit(jax.vmap(make))(seed_keys()))
    found = {}
    for rank, described in plans.items():
        weights: dict[str, dict[str, np.ndarray]] = {}
        for plan in described.plans:
            whole, words = top.weights[plan.name], dict(plan.labels)
            weights[plan.name] = {}
            for part, array in whole.items():
                shape = plan.shapes[part]
                kept = np.zeros_like(array)
                inner = (slice(None), *(slice(n) for n in shape))
                kept[inner] = array[inner]
                if part.startswith("factor") and part != f"factor_{plan.axes.ins}":
                    narrow = plan.sizes[words[part][-1]]
                    kept *= (array.shape[-1] / narrow) ** 0.5
                weights[plan.name][part] = kept
        found[rank] = top.with_weights(weights)
    return found


def seed_keys() -> jax.Array:
    return jax.vmap(jax.random.key)(jnp.asarray(SEEDS))


def curve(
    name: str,
    task: Task,
    base: Tree,
    data: tuple[Any, Any],
    args: Any,
    results: Results,
) -> None:
    """All ranks of one method: rates on the first seed, the best rate on the others."""
    length = task.config.model.max_seq_len
    describe = lambda rank: jax.eval_shape(
        lambda: init_adapters(base, adapter(name, rank), jax.random.key(0))
    )
    made = start_ranks(
        lambda key: init_adapters(base, adapter(name, max(RANKS)), key),
        {rank: describe(rank) for rank in RANKS},
    )
    sizes = {rank: count_adapter_params(describe(rank)) for rank in RANKS}
    frozen = freeze_params(base, task.config)

    def one(item: Any, frozen: Tree, train: jax.Array, valid: jax.Array) -> jax.Array:
        start, rate, seed = item

        def objective(weights: Tree, batch: Any) -> jax.Array:
            adapters = start.with_weights(weights)
            return apply_adapted(
                task.objective, frozen, adapters, batch, path=args.path, training=True
            )

        run = Run(train, rate, seed, args.steps, args.batch)
        weights = fit(task, frozen, run, start, args.path)
        return bits_per_byte(objective, weights, valid, length)

    run = over_stack(one, args.together, frozen, *data)
    take = lambda rank, seed: jax.tree.map(lambda a: a[seed], made[rank])
    solve(name, run, take, RANKS, sizes, results)


def full(
    task: Task, base: Tree, data: tuple[Any, Any], args: Any, results: Results
) -> None:
    """Full fine-tuning: the ceiling."""
    length = task.config.model.max_seq_len

    def one(item: Any, base: Tree, train: jax.Array, valid: jax.Array) -> jax.Array:
        _, rate, seed = item
        params = fit(task, base, Run(train, rate, seed, args.steps, args.batch))
        return bits_per_byte(task.objective, params, valid, length)

    run = over_stack(one, args.together, base, *data)
    size = sum(a.size for a in jax.tree.leaves(base))
    solve("full", run, lambda rank, seed: np.zeros(()), (0,), {0: size}, results)


def solve(
    name: str,
    run: Any,
    take: Any,
    ranks: Any,
    sizes: dict[int, int],
    results: Results,
    rates: tuple[float, ...] | None = None,
    metric: str = "bpb",
) -> None:
    """Run a curve's stacks, all of one shape: the first seed's rates, then seeds.

    The lower the metric, the better the rate.
    """
    rates = rates or RATES[name]

    def stack(items: list[tuple[int, float, int]]) -> list[float]:
        picked = [
            (take(rank, seed), np.float32(rate), np.int32(seed))
            for rank, rate, seed in items
        ]
        stacked = jax.tree.map(lambda *a: np.stack(a), *picked)
        return np.asarray(run(stacked)).tolist()

    table: dict[tuple[int, float], list[float]] = {}
    for rate in rates:
        key = f"{name}/rate {rate}"
        if key not in results.done:
            began = time.time()
            values = stack([(rank, rate, 0) for rank in ranks])
            results.put(key, {metric: values, "seconds": time.time() - began})
        values = results.done[key][metric]
        print(name, rate, [round(v, 4) for v in values], flush=True)
        for rank, value in zip(ranks, values, strict=True):
            table[rank, rate] = [value]
    best = {rank: min(rates, key=lambda r, k=rank: table[k, r][0]) for rank in ranks}
    for seed in SEEDS[1:]:
        key = f"{name}/seed {seed}"
        if key not in results.done:
            began = time.time()
            values = stack([(rank, best[rank], seed) for rank in ranks])
            results.put(key, {metric: values, "seconds": time.time() - began})
        for rank, value in zip(ranks, results.done[key][metric], strict=True):
            table[rank, best[rank]].append(value)
    curve = [
        {"rank": r, "params": sizes[r], "rate": best[r], metric: table[r, best[r]]}
        for r in ranks
    ]
    results.put(name, curve)
    for row in curve:
        print(f"{name:14s} rank {row['rank']:3d} params {row['params']:9,d} rate "
              f"{row['rate']:.0e} {metric} {np.mean(row[metric]):.4f} "
              f"+- {np.std(row[metric]):.4f}", flush=True)  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="file of the trained base model")
    parser.add_argument("--tiny", action="store_true", help="try it on a CPU")
    parser.add_argument("--curves", nargs="*", default=[*ADAPTERS, "full"])
    parser.add_argument("--path", default="auto")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--base-steps", type=int, default=12_000)
    parser.add_argument("--base-batch", type=int, default=32)
    parser.add_argument("--base-rate", type=float, default=1e-3)
    parser.add_argument("--wiki-bytes", type=int, default=60_000_000)
    parser.add_argument("--together", type=int, default=1, help="runs side by side")
    return parser.parse_args()


def main() -> None:
    args = parse()
    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)
    args.out.mkdir(parents=True, exist_ok=True)
    config = base_experiment(tiny=args.tiny)
    results = Results(args.out / "adapters_lm.json")
    began = time.time()
    task = Task(config)
    base, wiki = train_base(task, args)
    print(f"base: {wiki:.4f} bpb on Wikipedia, {time.time() - began:.0f} s", flush=True)
    data = tuple(jnp.asarray(part) for part in python_source(config))
    score = jax.jit(
        functools.partial(
            bits_per_byte, task.objective, length=config.model.max_seq_len
        )
    )
    before = float(score(base, data[1]))
    print(f"before adapting: {before:.4f} bpb on Python", flush=True)
    results.put(
        "about",
        {
            **made_with(),
            "config": as_dict(config),
            "options": {k: str(v) for k, v in vars(args).items()},
            "base_params": sum(a.size for a in jax.tree.leaves(base)),
            "base_bpb_wikipedia": wiki,
            "base_bpb_python": before,
            "python_bytes": [int(part.shape[0]) for part in data],
        },
    )
    for name in args.curves:
        began = time.time()
        try:
            if name == "full":
                full(task, base, data, args, results)
            else:
                curve(name, task, base, data, args, results)
        except Exception as error:  # the other curves still count
            print(f"{name} failed: {type(error).__name__}: {error}"[:2000], flush=True)
        print(f"{name}: {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
