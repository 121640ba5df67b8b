"""A curve: one adapter at several ranks, its runs one compiled program.

Ranks are padded to the highest, where they train as if they were alone, and every
(rank, rate, seed) is one entry of a stack. Results are saved after every stack; a
second call goes on with what is missing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.e006_adapters.config import SEEDS
from uoe_jax.adapt import Adapters, count_adapter_params
from uoe_jax.bench.record import read_record, write_record


class Results:
    """One half of a JSON file of what is done, rewritten after every entry."""

    def __init__(self, path: Path, half: str):
        self.path, self.whole = path, read_record(path)
        self.done: dict[str, Any] = self.whole.setdefault(half, {})

    def put(self, key: str, value: Any) -> None:
        """Keep an entry."""
        self.done[key] = value
        write_record(self.path, self.whole)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """What is run of each rank: `run` takes a stack of (start, rate, seed)."""

    name: str
    metric: str
    rates: tuple[float, ...]
    sizes: dict[int, int]  # trained parameters by rank
    run: Callable[[Any], Any]
    starts: dict[int, Adapters] | None = None  # one a seed; None: nothing to start from

    def start(self, rank: int, seed: int) -> Any:
        """Return what a run starts from."""
        if self.starts is None:
            return np.zeros(())
        return jax.tree.map(lambda a: a[seed], self.starts[rank])


def over_stack(
    one: Callable[..., jax.Array], together: int, *shared: Any
) -> Callable[[Any], Any]:
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
    make: Callable[[int, jax.Array], Adapters], ranks: Sequence[int]
) -> tuple[dict[int, Adapters], dict[int, int]]:
    """Return every rank's first adapters, one a seed, padded, and their parameters.

    Drawn once at the highest rank and cut: the spread of the factors that depends on
    the rank (`peft`: all but the input's) is set to what their own rank asks for.
    """
    keys = jax.vmap(jax.random.key)(jnp.asarray(SEEDS))
    top = jax.device_get(jax.jit(jax.vmap(lambda key: make(max(ranks), key)))(keys))
    found, sizes = {}, {}
    for rank in ranks:
        described = jax.eval_shape(lambda rank=rank: make(rank, jax.random.key(0)))
        sizes[rank] = count_adapter_params(described)
        weights: dict[str, dict[str, np.ndarray]] = {}
        for plan in described.plans:
            whole, words = top.weights[plan.name], dict(plan.labels)
            weights[plan.name] = {}
            for part, array in whole.items():
                kept = np.zeros_like(array)
                inner = (slice(None), *(slice(n) for n in plan.shapes[part]))
                kept[inner] = array[inner]
                if part.startswith("factor") and part != f"factor_{plan.axes.ins}":
                    narrow = plan.sizes[words[part][-1]]
                    kept *= (array.shape[-1] / narrow) ** 0.5
                weights[plan.name][part] = kept
        found[rank] = top.with_weights(weights)
    return found, sizes


def solve(curve: Curve, results: Results) -> None:
    """Run a curve's stacks, all of one shape: the first seed's rates, then seeds.

    The lower the metric, the better the rate.
    """
    name, metric, ranks = curve.name, curve.metric, list(curve.sizes)

    def stack(key: str, rate_of: dict[int, float], seed: int) -> list[float]:
        if key not in results.done:
            began = time.time()
            picked = [
                (curve.start(rank, seed), np.float32(rate_of[rank]), np.int32(seed))
                for rank in ranks
            ]
            stacked = jax.tree.map(lambda *a: np.stack(a), *picked)
            values = np.asarray(curve.run(stacked)).tolist()
            results.put(key, {metric: values, "seconds": time.time() - began})
        return results.done[key][metric]

    table: dict[tuple[int, float], list[float]] = {}
    for rate in curve.rates:
        values = stack(f"{name}/rate {rate}", dict.fromkeys(ranks, rate), SEEDS[0])
        print(name, rate, [round(value, 4) for value in values], flush=True)
        table |= {(r, rate): [value] for r, value in zip(ranks, values, strict=True)}
    best = {r: min(curve.rates, key=lambda rate, r=r: table[r, rate]) for r in ranks}
    for seed in SEEDS[1:]:
        values = stack(f"{name}/seed {seed}", best, seed)
        for rank, value in zip(ranks, values, strict=True):
            table[rank, best[rank]].append(value)
    rows = [
        {
            "rank": r,
            "params": curve.sizes[r],
            "rate": best[r],
            metric: table[r, best[r]],
        }
        for r in ranks
    ]
    results.put(name, rows)
