"""One training step of an adapter: gradients of its factors only, the base frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, PyTree

from uoe_jax.adapt.adapters import Adapters, Weights
from uoe_jax.adapt.apply import apply_adapted
from uoe_jax.adapt.config import Path
from uoe_jax.config import ExperimentConfig
from uoe_jax.model import router_losses
from uoe_jax.ops._dispatch import vary_together
from uoe_jax.optim import make_schedule
from uoe_jax.partition.mesh import DATA_AXIS
from uoe_jax.train.state import TrainState
from uoe_jax.train.step import batch_loss, count_tokens, example_weights
from uoe_jax.tree import named_leaves, replace_leaves

Metrics = dict[str, Any]

# Weights that the model itself casts to the compute dtype before it uses them.
_CAST = ("wq", "wk", "wv", "wo", "w_up", "w_gate", "w_down", "embedding")


def freeze_params(params: PyTree, config: ExperimentConfig) -> PyTree:
    """Return the parameters as a frozen base: large weights in the compute dtype.

    Half the memory in bfloat16, and the same forward pass: the model casts those
    weights on every use.
    """
    dtype = jnp.dtype(config.model.compute_dtype)
    cast = {
        name: leaf.astype(dtype)
        for name, leaf in named_leaves(params).items()
        if name.rpartition(".")[2] in _CAST or name == "head.weight"
    }
    return replace_leaves(params, cast)


def init_adapt_state(
    adapters: Adapters, optimizer: optax.GradientTransformation
) -> TrainState:
    """Return the first state: factors and their optimizer moments, nothing else."""
    # Copies: the step donates its state, and the caller keeps the fresh adapter.
    weights = jax.tree.map(jnp.copy, adapters.weights)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=weights,
        opt_state=optimizer.init(weights),
        buffers={},
        bad_steps=jnp.zeros((), jnp.int32),
    )


def make_adapt_step(
    config: ExperimentConfig,
    graphdef: nnx.GraphDef,
    adapters: Adapters,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    *,
    path: Path = "auto",
) -> Callable[[TrainState, PyTree, PyTree, Any], tuple[TrainState, Metrics]]:
    """Return the jitted (state, params, buffers, batch) -> (state, metrics).

    The state is donated; parameters and routers' biases are read only. A step whose
    loss or gradient isn't finite changes nothing but the counters.
    """
    schedule = make_schedule(config.optim, config.train.steps)
    seed = config.train.seed

    def body(
        weights: Weights, params: PyTree, buffers: PyTree, step: Array, batch: Any
    ):
        key = jax.random.fold_in(jax.random.key(seed), step)
        key = jax.random.fold_in(key, jax.lax.axis_index(DATA_AXIS))
        run = _Objective(config, graphdef, adapters, path, params, buffers)
        return run.gradients(weights, batch, key)

    spec = PartitionSpec
    compute = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(spec(), spec(), spec(), spec(), spec(None, DATA_AXIS)),
        out_specs=(spec(), spec()),
    )

    def step(
        state: TrainState, params: PyTree, buffers: PyTree, batch: Any
    ) -> tuple[TrainState, Metrics]:
        grads, sums = compute(state.params, params, buffers, state.step, dict(batch))
        norm = optax.tree.norm(grads)
        keep = jnp.isfinite(sums["objective"]) & jnp.isfinite(norm)
        keep &= state.bad_steps < config.train.max_bad_steps
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, step=state.step
        )
        weights = optax.apply_updates(state.params, updates)
        choose = lambda new, old: jnp.where(keep, new, old)
        bad_steps = jnp.where(keep, 0, state.bad_steps + 1)
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            params=jax.tree.map(choose, weights, state.params),
            opt_state=jax.tree.map(choose, opt_state, state.opt_state),
            bad_steps=bad_steps,
        )
        metrics = {
            "loss": sums["loss"],
            "grad_norm": norm,
            "lr": schedule(state.step),
            "tokens": sums["tokens"],
            "bad_steps": bad_steps,
        }
        return new, metrics

    return jax.jit(step, donate_argnums=0)


@dataclasses.dataclass(frozen=True)
class _Objective:
    """The loss of an adapted model inside a shard_map over the data axis."""

    config: ExperimentConfig
    graphdef: nnx.GraphDef
    adapters: Adapters
    path: Path
    params: PyTree
    buffers: PyTree

    def gradients(
        self, weights: Weights, batch: Any, key: jax.Array
    ) -> tuple[Weights, Metrics]:
        """Return the factors' gradients and the sums over all devices' microbatches."""
        local = jax.tree.map(_varying, weights)
        count = jax.lax.psum(jnp.sum(example_weights(batch)), DATA_AXIS)
        count = jnp.maximum(count, 1.0)
        parts = example_weights(batch).shape[0]
        share = 1.0 / (parts * jax.lax.axis_size(DATA_AXIS))

        def objective(local: Weights, part: Any, index: Array) -> tuple[Array, Any]:
            part_key = jax.random.fold_in(key, index)
            sums, aux = self.loss(local, part, part_key)
            value = sums.objective / count
            value += share * router_losses(aux, self.config.model)
            return value, (sums.nll, count_tokens(part, self.config))

        def one(total: Weights, item: Any) -> tuple[Weights, Any]:
            (value, extra), grads = jax.value_and_grad(objective, has_aux=True)(
                local, *item
            )
            add = lambda a, g: a + g.astype(a.dtype)
            return jax.tree.map(add, total, grads), (value, *extra)

        zeros = jax.tree.map(lambda a: jnp.zeros_like(a, jnp.float32), local)
        if parts == 1:
            first = jax.tree.map(lambda a: a[0], batch)
            grads, outs = one(zeros, (first, jnp.int32(0)))
        else:
            grads, outs = jax.lax.scan(one, zeros, (batch, jnp.arange(parts)))
        value, nll, tokens = (
            jax.lax.psum(_varying(jnp.sum(o)), DATA_AXIS) for o in outs
        )
        sums = {"objective": value, "loss": nll / count, "tokens": tokens}
        return jax.lax.psum(grads, DATA_AXIS), sums

    def loss(self, weights: Weights, part: Any, key: jax.Array) -> tuple[Any, PyTree]:
        """Return one microbatch's loss sums and router statistics."""

        def call(params: PyTree, part: Any) -> tuple[Any, PyTree]:
            model = nnx.merge(self.graphdef, params, self.buffers)
            return batch_loss(model, part, self.config, key=key, axis_name=DATA_AXIS)

        dropped = any(plan.dropout for plan in self.adapters.plans)
        return apply_adapted(
            call,
            self.params,
            self.adapters.with_weights(weights),
            part,
            path=self.path,
            training=True,
            key=jax.random.fold_in(key, 1) if dropped else None,
        )


def _varying(x: Array) -> Array:
    """Mark an array as differing between devices: its gradient stays local."""
    return vary_together(x, jax.lax.axis_index(DATA_AXIS))[0]
