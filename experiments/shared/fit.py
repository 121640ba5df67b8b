"""One case trained: compiled once, run for each seed, without reading the device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PyTree

from experiments.shared.arrays import Arrays, eval_rows, make_take, train_rows
from uoe_jax.config import ExperimentConfig
from uoe_jax.hardware.count import (
    count_active_params,
    count_params,
    flops_per_token,
    num_tokens,
)
from uoe_jax.model import make_model
from uoe_jax.optim import make_optimizer
from uoe_jax.partition.mesh import make_mesh, replicated
from uoe_jax.train.state import TrainState
from uoe_jax.train.step import make_step
from uoe_jax.train.validate import make_eval_step
from uoe_jax.validation import validate

CHUNKS = 20  # of a run; losses are read back at the end of each
CHECKS = 5  # validations of a run, the last at its end


class OutOfTime(Exception):
    """The budget ended inside a run."""


class Fit:
    """A case's compiled programs: init, a chunk of steps, a split's scores."""

    def __init__(self, config: ExperimentConfig, data: dict[str, Arrays]):
        validate(config)
        self.config = config
        mesh = make_mesh(config.mesh, batch_size=config.data.batch_size)
        optimizer = make_optimizer(config.optim, config.train.steps)
        make = lambda key: nnx.split(make_model(config.model, key), nnx.Param, ...)
        graphdef = jax.eval_shape(make, jax.random.key(0))[0]

        def init(key: Array) -> TrainState:
            _, params, buffers = make(key)
            zero = jnp.zeros((), jnp.int32)
            return TrainState(
                step=zero,
                params=params,
                opt_state=optimizer.init(params),
                buffers=buffers,
                bad_steps=zero,
            )

        self.chunk = max(config.train.steps // CHUNKS, 1)
        step = make_step(config, graphdef, optimizer, mesh)
        score = make_eval_step(config, graphdef, mesh)
        take, whole = make_take(config), replicated(mesh)

        def many(
            state: TrainState, arrays: Arrays, rows: Array
        ) -> tuple[TrainState, PyTree]:
            def body(state: TrainState, row: Array) -> tuple[TrainState, PyTree]:
                return step(state, take(arrays, row))

            state, metrics = jax.lax.scan(body, state, rows)
            means = jax.tree.map(lambda a: jnp.mean(a, axis=0), metrics["router"])
            return state, {
                "loss": jnp.mean(metrics["loss"]),
                "bad_steps": jnp.max(metrics["bad_steps"]),
                "router": means,
            }

        def evaluate(
            params: PyTree, buffers: PyTree, arrays: Arrays, rows: Array
        ) -> PyTree:
            def body(sums: PyTree, row: Array) -> tuple[PyTree, None]:
                found = score(params, buffers, take(arrays, row))
                found = {name: found[name] for name in sums}
                return jax.tree.map(jnp.add, sums, found), None

            zeros = {name: jnp.zeros(()) for name in ("nll", "correct", "weight")}
            return jax.lax.scan(body, zeros, rows)[0]

        self.data = jax.device_put(data, whole)
        self._whole = whole
        self.init = jax.jit(init, out_shardings=whole)
        self._many = jax.jit(many, donate_argnums=0)
        self._evaluate = jax.jit(evaluate)

    def compile(self) -> float:
        """Compile the training chunk ahead; return the seconds it took."""
        start = time.perf_counter()
        state = jax.eval_shape(self.init, jax.random.key(0))
        shape = (self.chunk, self.config.data.batch_size)
        rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._whole)
        lowered = self._many.lower(state, self.data["train"], rows)
        self._many: Callable[..., Any] = lowered.compile()
        return time.perf_counter() - start

    def run(
        self, seed: int, deadline: float, say: Callable[[str], None]
    ) -> dict[str, Any]:
        """Return one seed's result; raise OutOfTime past `deadline`.

        Validation picks the parameters that are tested. Seconds are those of training
        steps; waiting for a chunk ends it.
        """
        steps = self.chunk * CHUNKS
        count = len(next(iter(self.data["train"].values())))
        rows = self._put(train_rows(self.config, count, seed, steps))
        state = self.init(jax.random.key(seed))
        curve, seconds, best, kept = [], 0.0, math.inf, None
        jax.block_until_ready(state)
        for number in range(CHUNKS):
            part = rows[number * self.chunk : (number + 1) * self.chunk]
            start = time.perf_counter()
            state, metrics = self._many(state, self.data["train"], part)
            metrics = jax.device_get(metrics)
            seconds += time.perf_counter() - start
            done = (number + 1) * self.chunk
            line = {"step": done, "seconds": seconds, "train": float(metrics["loss"])}
            line["bad_steps"] = int(metrics["bad_steps"])  # in a row, left out
            if (number + 1) % (CHUNKS // CHECKS) == 0:
                line["valid"] = self.scores(state, "valid")
                if line["valid"]["loss"] < best:
                    best = line["valid"]["loss"]
                    kept = jax.tree.map(jnp.copy, (state.params, state.buffers))
            curve.append(line)
            shown = line.get("valid", {}).get("loss", math.nan)
            say(f"step {done} {seconds:.1f} s train {line['train']:.4f} {shown:.4f}")
            if not math.isfinite(line["train"]) or time.perf_counter() > deadline:
                break
        if len(curve) < CHUNKS and math.isfinite(curve[-1]["train"]):
            raise OutOfTime("ran out of the budget")
        result = {"seed": seed, "steps": steps, "seconds": seconds, "curve": curve}
        if kept is not None:
            params, buffers = kept
            final = TrainState(
                step=0, params=params, opt_state=(), buffers=buffers, bad_steps=0
            )
            result["valid"] = self.scores(final, "valid")
            result["test"] = self.scores(final, "test")
        result["router"] = jax.tree.map(lambda a: np.asarray(a).tolist(), metrics)[
            "router"
        ]
        return result

    def _put(self, rows: np.ndarray) -> Array:
        return jax.device_put(rows, self._whole)

    def scores(self, state: TrainState, split: str) -> dict[str, float]:
        """Return loss (nats), bits per token and accuracy over a whole split."""
        arrays = self.data[split]
        count = len(next(iter(arrays.values())))
        rows = self._put(eval_rows(self.config, count))
        sums = self._evaluate(state.params, state.buffers, arrays, rows)
        total = {name: float(value) for name, value in sums.items()}
        loss = total["nll"] / total["weight"]
        return {
            "loss": loss,
            "bits_per_byte": loss / math.log(2),
            "accuracy": total["correct"] / total["weight"],
        }


def describe(config: ExperimentConfig) -> dict[str, Any]:
    """Return a config's sizes: parameters, FLOPs and tokens of a whole run."""
    model = config.model
    flops = flops_per_token(model, config.seq_len)
    tokens = num_tokens(model, config.seq_len) * config.data.batch_size
    return {
        "parameters": sum(count_params(model).values()),
        "active_parameters": count_active_params(model),
        "forward_flops_per_token": flops.forward,
        "tokens_per_step": tokens,
        "training_flops_per_step": flops.training * tokens,
    }
