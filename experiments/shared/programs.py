"""A model's compiled programs: its start, a chunk of training steps, a split's scores.

The rate of each step and the seed are data, so all runs of a model share them, of
whatever schedule. A chunk is a scan
over the project's one step and not `train`'s loop: that dispatches each step, reads its
metrics and writes a run's folder, which takes longer than such a step does.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from experiments.shared.arrays import Arrays, eval_rows, make_take, num_examples
from experiments.shared.stack import first_state, with_rate
from uoe_jax.config import ExperimentConfig, MeshConfig, ModelConfig, OptimConfig
from uoe_jax.errors import ConfigError
from uoe_jax.model import make_model
from uoe_jax.optim import make_optimizer, make_schedule
from uoe_jax.partition.mesh import make_mesh, replicated
from uoe_jax.runs.state import TrainState
from uoe_jax.train.loss import output_layer, token_scores
from uoe_jax.train.step import hidden_states, make_step
from uoe_jax.train.validate import make_eval_step
from uoe_jax.validation import validate

CHUNKS = 20  # of a run, one dispatch each
_PROBES = 4  # batches of the leak probe
_MOVED = ("before", "after", "noise")


def step_rates(optim: OptimConfig, steps: int, peak: float) -> Float[np.ndarray, " S"]:
    """Return the rate of each step of a run whose highest is `peak`."""
    schedule = make_schedule(dataclasses.replace(optim, learning_rate=peak), steps)
    rate = lambda step: jnp.asarray(schedule(step), jnp.float32)
    return np.asarray(jax.vmap(rate)(jnp.arange(steps)))


class Programs:
    """What trains and scores one model on splits that lie on the device.

    A dispatch trains `chunk` steps; not given: a twentieth of the run.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        data: Mapping[str, Arrays],
        chunk: int | None = None,
    ):
        validate(config)
        steps = config.train.steps
        if chunk is None and steps % CHUNKS:
            raise ConfigError(
                f"train.steps is {steps}; an experiment has {CHUNKS} chunks, use "
                f"{max(round(steps / CHUNKS), 1) * CHUNKS}"
            )
        # One device a process, whatever else the machine has.
        config = dataclasses.replace(config, mesh=MeshConfig(data=1))
        self.config, self.chunk = config, chunk or steps // CHUNKS
        mesh = make_mesh(config.mesh)
        optim = dataclasses.replace(
            config.optim, learning_rate=1.0, schedule="constant", warmup_steps=0
        )
        optimizer = with_rate(make_optimizer(optim, steps))
        make = lambda key: nnx.split(make_model(config.model, key), nnx.Param, ...)
        graphdef = jax.eval_shape(make, jax.random.key(0))[0]
        step = make_step(config, graphdef, optimizer, mesh)
        take = make_take(config)

        def begin(params: PyTree, buffers: PyTree) -> TrainState:
            return first_state(params, buffers, optimizer, jnp.ones(()))

        def init(key: Array) -> TrainState:
            return begin(*make(key)[1:])

        def many(
            state: TrainState,
            arrays: Arrays,
            rows: Int[Array, "S B"],
            rates: Float[Array, " S"],
        ) -> tuple[TrainState, PyTree]:
            def body(state: TrainState, part: Any) -> tuple[TrainState, PyTree]:
                row, rate = part
                optim: Any = state.opt_state
                rated = dataclasses.replace(state, opt_state=optim | {"rate": rate})
                return step(rated, take(arrays, row))

            state, metrics = jax.lax.scan(body, state, (rows, rates))
            good = metrics["bad_steps"] == 0  # others changed nothing
            return state, {
                "loss": jnp.mean(metrics["loss"], where=good),
                "skipped": jnp.sum(~good),
                "router": jax.tree.map(partial(jnp.mean, axis=0), metrics["router"]),
            }

        self._whole = replicated(mesh)
        self.data = jax.device_put(dict(data), self._whole)
        self._init = jax.jit(init, out_shardings=self._whole)
        self._begin = jax.jit(begin, out_shardings=self._whole)
        self._many: Any = jax.jit(many, donate_argnums=0)
        self._score = make_eval_step(config, graphdef, mesh)
        self._take = jax.jit(take)
        self._each: dict[ModelConfig, Any] = {}  # by the model that is scored

    def compile(self, tokens: bool = False) -> float:
        """Compile all programs ahead; return the seconds it took.

        With `tokens` the scores of each token too.
        """
        start = time.perf_counter()
        # Loading cuDNN's graphs goes wrong beside other work: all of it is waited for.
        jax.block_until_ready(self.data)
        state = jax.eval_shape(self._init, jax.random.key(0))
        shape = (self.chunk, self.config.data.batch_size)
        on_device = partial(jax.ShapeDtypeStruct, sharding=self._whole)
        parts = (on_device(shape, jnp.int32), on_device(shape[:1], jnp.float32))
        self._many = self._many.lower(state, self.data["train"], *parts).compile()
        # Used once, so that no run waits for them at its first validation.
        first, arrays = jax.block_until_ready(self.start(0)), self.data["valid"]
        row = eval_rows(self.config, num_examples(arrays))[0]
        batch = jax.block_until_ready(self._take(arrays, self.place(row)))
        self._sums(first.params, first.buffers, [batch])
        if tokens:
            scored = self._scores_each(self.config.model)
            jax.block_until_ready(scored(first.params, first.buffers, batch))
        return time.perf_counter() - start

    def start(self, seed: int) -> TrainState:
        """Return the state before the first step."""
        return self._init(jax.random.key(seed))

    def start_from(self, params: PyTree, buffers: PyTree) -> TrainState:
        """Return the state before the first step from some weights on."""
        return self._begin(*self.place((params, buffers)))

    def place(self, tree: PyTree) -> PyTree:
        """Return arrays of the host where the programs want them."""
        return jax.device_put(tree, self._whole)

    def train(
        self,
        state: TrainState,
        rows: Int[np.ndarray, "S B"],
        rates: Float[np.ndarray, " S"],
    ) -> tuple[TrainState, PyTree]:
        """Return the state after a chunk of steps, and its mean loss and routing.

        Steps that weren't finite are left out; without any other the loss is nan. The
        old state's memory is used again.
        """
        parts = self.place((rows, rates))
        return self._many(state, self.data["train"], *parts)

    def scores(self, params: PyTree, buffers: PyTree, split: str) -> dict[str, float]:
        """Return loss (nats), bits per token and accuracy over a whole split."""
        arrays = self.data[split]
        rows = eval_rows(self.config, num_examples(arrays))
        batches = (self._take(arrays, row) for row in self.place(rows))
        total = self._sums(params, buffers, batches)
        loss = total["nll"] / total["weight"]
        return {
            "loss": loss,
            # Of text, where a token is a byte.
            "bits_per_byte": loss / math.log(2),
            "accuracy": total["correct"] / total["weight"],
        }

    def each_token(
        self,
        params: PyTree,
        buffers: PyTree,
        split: str,
        model: ModelConfig | None = None,
    ) -> dict[str, np.ndarray]:
        """Return of every token its `nll`, whether it is `correct`, and its `weight`.

        [N, T] each, in the order of the split's examples. `model` is another config
        with the same parameters, such as one with another `top_k`.
        """
        arrays = self.data[split]
        found, score = [], self._scores_each(model or self.config.model)
        for row in self.place(eval_rows(self.config, num_examples(arrays))):
            found.append(score(params, buffers, self._take(arrays, row)))
        found = jax.device_get(found)
        whole = {name: np.concatenate([f[name] for f in found]) for name in found[0]}
        return {name: a[: num_examples(arrays)] for name, a in whole.items()}

    def _scores_each(self, model: ModelConfig) -> Any:
        """Return the jitted (params, buffers, batch) -> scores of every token."""
        if model not in self._each:
            config = dataclasses.replace(self.config, model=model)
            make = lambda: nnx.split(
                make_model(model, jax.random.key(0)), nnx.Param, ...
            )
            score = partial(_each_token, config, jax.eval_shape(make)[0])
            self._each[model] = jax.jit(score)
        return self._each[model]

    def leak(self, params: PyTree, buffers: PyTree) -> dict[str, float] | None:
        """Return how much the loss moves when later tokens change; None: no decoder.

        `before`: the mean loss of tokens before the change moved by so many nats, and
        a causal model's doesn't; `after`: of those behind it, which must move. `noise`:
        what rounding alone moves, from a batch's rows in another order: tokens are then
        packed elsewhere, and a router that nearly ties may choose another head.
        """
        if self.config.model.kind != "decoder":
            return None
        arrays = self.data["valid"]
        rows = eval_rows(self.config, num_examples(arrays))[:_PROBES]
        batches = [self._take(arrays, row) for row in self.place(rows)]
        turned = [jax.tree.map(lambda a: a[..., ::-1, :], batch) for batch in batches]
        length, moved = self.config.seq_len, dict.fromkeys(_MOVED, 0.0)
        place = jnp.arange(length)[None, None]
        for cut in (length // 4, length // 2, length - length // 8):
            behind = place >= cut
            loss = partial(self._loss, params, buffers)
            early, late = loss(batches, ~behind, None), loss(batches, behind, None)
            for name, by in (
                ("before", loss(batches, ~behind, behind) - early),
                ("after", loss(batches, behind, behind) - late),
                ("noise", loss(turned, ~behind, None) - early),
            ):
                moved[name] = float(np.maximum(moved[name], abs(by)))  # keeps nan
        return moved

    def _loss(
        self,
        params: PyTree,
        buffers: PyTree,
        batches: Iterable[Arrays],
        weigh: Bool[Array, "1 1 T"],
        changed: Bool[Array, "1 1 T"] | None,
    ) -> float:
        """Return the mean loss of some tokens, with some inputs turned into others."""

        def prepare(batch: Arrays) -> Arrays:
            tokens, size = batch["tokens"], self.config.model.vocab_size
            if changed is not None:
                tokens = jnp.where(changed, (tokens * 7 + 11) % size, tokens)
            return batch | {"tokens": tokens, "mask": batch["mask"] * weigh}

        total = self._sums(params, buffers, map(prepare, batches))
        return total["nll"] / total["weight"]

    def _sums(
        self, params: PyTree, buffers: PyTree, batches: Iterable[Arrays]
    ) -> dict[str, float]:
        names = ("nll", "correct", "weight")
        found = []
        for batch in batches:
            sums = self._score(params, buffers, batch)
            found.append({name: sums[name] for name in names})
        found = jax.device_get(found)
        return {name: sum(float(f[name]) for f in found) for name in names}


def _each_token(
    config: ExperimentConfig,
    graphdef: nnx.GraphDef,
    params: PyTree,
    buffers: PyTree,
    batch: Arrays,
) -> dict[str, Array]:
    """Return a decoder's scores of every token of a batch [1, B, T], [B, T] each."""
    part = jax.tree.map(lambda a: a[0], dict(batch))
    model = nnx.merge(graphdef, params, buffers)
    x, _ = hidden_states(model, part, config)
    targets, chunk = part["targets"].reshape(-1), config.train.loss_chunk
    scores = token_scores(
        x.reshape(-1, x.shape[-1]), *output_layer(model), targets, chunk
    )
    shape = part["targets"].shape
    return {
        "nll": scores.nll.reshape(shape),
        "correct": scores.correct.reshape(shape),
        "weight": part["mask"],
    }
