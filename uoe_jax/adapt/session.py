"""An adapter's training on a mesh: the base frozen, what it took measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PyTree

from uoe_jax.adapt.adapters import Adapters
from uoe_jax.adapt.apply import adapted_params
from uoe_jax.adapt.config import Path as Forward
from uoe_jax.adapt.step import freeze_params, init_adapt_state, make_adapt_step
from uoe_jax.config import ExperimentConfig
from uoe_jax.data import Dataset, prefetch
from uoe_jax.errors import NonFiniteError
from uoe_jax.optim import make_optimizer
from uoe_jax.partition.mesh import replicated, split_over_data
from uoe_jax.train.validate import make_eval_step, run_validation

Note = Callable[[str], None]


class Session:
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
        log, shown = StepLog(config), max(config.train.log_every, 1)
        pending = None
        start = time.perf_counter()
        with prefetch(self.batch, 0, steps) as batches:
            for number, batch in enumerate(batches, 1):
                state, metrics = compiled(state, *inputs, batch)
                # Read one step late, so that the devices never wait for it.
                pending, ready = metrics, pending
                if ready is not None:
                    log.read(ready)
                if number % shown == 0 and log.losses:
                    note(f"step {number}/{steps}  loss {log.losses[-1]:.4f}")
        assert pending is not None
        log.read(pending)
        seconds = time.perf_counter() - start
        memory = compiled.memory_analysis()
        # Off the mesh: what follows takes the run's own, unplaced parameters too.
        weights = jax.tree.map(jnp.asarray, jax.device_get(state.params))
        trained = adapters.with_weights(weights)
        return trained, {
            "steps": steps,
            # JSON has no NaN: a skipped step may have no loss.
            "losses": [x if math.isfinite(x) else None for x in log.losses],
            "seconds": seconds,
            "compile_seconds": compile_seconds,
            "tokens_per_second": log.tokens / seconds,
            "memory_bytes": {
                "frozen_base": _bytes(self.frozen),
                "adapter": _bytes(state.params),
                "optimizer": _bytes(state.opt_state),
                "temporary": getattr(memory, "temp_size_in_bytes", None),
            },
            "skipped_steps": log.skipped,
        }


class StepLog:
    """What the steps of a training said."""

    def __init__(self, config: ExperimentConfig):
        self.config = config
        self.losses: list[float] = []
        self.tokens = self.skipped = 0

    def read(self, metrics: dict[str, Any]) -> None:
        """Take in a step; raise NonFiniteError after too many bad ones in a row."""
        self.losses.append(float(metrics["loss"]))
        self.tokens += int(metrics["tokens"])
        bad, limit = int(metrics["bad_steps"]), self.config.train.max_bad_steps
        self.skipped += bad > 0
        if bad >= limit:
            raise NonFiniteError(
                f"loss or gradient wasn't finite {bad} steps in a row up to step "
                f"{len(self.losses)}; lower the learning rate, "
                f"{self.config.optim.learning_rate:g}"
            )


def _bytes(tree: PyTree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes"))
