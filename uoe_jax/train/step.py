"""One training step: gradients in a shard_map over the whole mesh, then the update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from uoe_jax.config import ExperimentConfig
from uoe_jax.hardware.count import num_tokens
from uoe_jax.model import Decoder, router_losses
from uoe_jax.model.routing.balance import PARTS, router_configs
from uoe_jax.optim import follow_weights, make_schedule
from uoe_jax.partition.collectives import Parallel, agreed, count_copies, total
from uoe_jax.partition.layout import Layout, batch_spec
from uoe_jax.partition.mesh import DATA_AXIS
from uoe_jax.runs.state import TrainState, layout_of
from uoe_jax.train.level import follow_loss, loss_limit
from uoe_jax.train.loss import (
    LossSums,
    LossTerms,
    Taught,
    class_losses,
    linear_cross_entropy,
    output_layer,
)
from uoe_jax.train.subject import WHOLE_MODEL, Objective

Batch = Mapping[str, Array]
Metrics = dict[str, Any]


def put_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, accumulate: int = 1
) -> dict[str, Array]:
    """Place a host batch [B, ...] as microbatches [A, B/A, ...] on the mesh.

    Rows are split over data and fsdp, tokens over sequence.
    """
    parts = {
        k: v.reshape(accumulate, v.shape[0] // accumulate, *v.shape[1:])
        for k, v in batch.items()
    }
    shardings = {
        name: NamedSharding(mesh, batch_spec(mesh, part.ndim))
        for name, part in parts.items()
    }
    return jax.device_put(parts, shardings)


def example_weights(batch: Batch) -> Float[Array, "*N"]:
    """Return the loss weight of every token (decoder) or example (classifiers).

    Rows that only fill up a batch weigh nothing: their mask is 0, their label -1.
    """
    weights = batch["mask"] if "mask" in batch else batch["labels"] >= 0
    return weights.astype(jnp.float32)


def count_tokens(batch: Batch, config: ExperimentConfig) -> Int[Array, ""]:
    """Return how many tokens the model works on, padding left out."""
    if "images" in batch:
        images = jnp.sum((batch["labels"] >= 0).astype(jnp.int32))
        return images * num_tokens(config.model)
    return jnp.sum((batch["segments"] != 0).astype(jnp.int32))


def scored_tokens(batch: Batch, config: ExperimentConfig) -> Bool[Array, ...] | None:
    """Return which tokens [..., T] the loss is of, None where no router asks.

    Rows that only fill up a batch and targets that don't count are none of them.
    """
    if not any(router_configs(config.model, part) for part in PARTS):
        return None
    weights = example_weights(batch) > 0
    if "mask" in batch:
        return weights
    if "segments" in batch:
        return weights[..., None] & (batch["segments"] != 0)
    shape = (*weights.shape, num_tokens(config.model))
    return jnp.broadcast_to(weights[..., None], shape)


def hidden_states(
    model: Decoder, batch: Batch, config: ExperimentConfig, **kwargs: Any
) -> tuple[Float[Array, "B T D"], PyTree]:
    """Return a decoder's last hidden states and the routers' statistics."""
    if config.data.pack == "documents":
        kwargs |= {"positions": batch["positions"], "segments": batch["segments"]}
    return model.hidden(batch["tokens"], **kwargs)


def loss_tokens(
    x: Float[Array, "B T D"],
    targets: Int[Array, "B T2"],
    weights: Float[Array, "B T2"],
    parallel: Parallel | None,
) -> tuple[Array, Array, Array]:
    """Return the hidden states, targets and weights whose loss this device takes.

    The devices of a tensor group share the tokens, so that none repeats the output
    layer's work.
    """
    if parallel is None:
        return x, targets, weights
    own = parallel.own_tokens
    return x if parallel.scatters else own(x), own(targets), own(weights)


def batch_loss(
    model: Any,
    batch: Batch,
    config: ExperimentConfig,
    *,
    key: jax.Array | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    parallel: Parallel | None = None,
    taught: Taught | None = None,
) -> tuple[LossSums, PyTree]:
    """Return loss sums over one batch [B, ...] and the routers' statistics.

    With a `parallel` the sums are of the tokens whose loss this device takes; `taught`
    is what a teacher says of these.
    """
    kwargs: dict[str, Any] = {"key": key, "train": True, "axis_name": axis_name}
    kwargs |= {"parallel": parallel, "scored": scored_tokens(batch, config)}
    weights = example_weights(batch)
    train = config.train
    if config.model.kind == "decoder":
        x, aux = hidden_states(model, batch, config, **kwargs)
        x, targets, weights = loss_tokens(x, batch["targets"], weights, parallel)
        sums = linear_cross_entropy(
            x.reshape(-1, x.shape[-1]),
            *output_layer(model),
            targets.reshape(-1),
            weights.reshape(-1),
            LossTerms(
                train.loss_chunk,
                train.z_loss,
                train.label_smoothing,
                train.distill_weight,
                train.distill_temperature,
            ),
            taught,
        )
        return sums, aux
    if config.model.kind == "encoder":
        logits, aux = model(batch["tokens"], segments=batch["segments"], **kwargs)
    else:
        logits, aux = model(batch["images"], **kwargs)
    labels = batch["labels"]
    sums = class_losses(logits, labels, weights, train.z_loss, train.label_smoothing)
    return sums, aux


class Held(NamedTuple):
    """What a device holds in a step: its shards of the trained and frozen arrays."""

    weights: PyTree
    buffers: PyTree
    frozen: PyTree


def gradients(
    graphdef: nnx.GraphDef,
    held: Held,
    batch: Batch,
    key: jax.Array,
    config: ExperimentConfig,
    layout: Layout,
    objective: Objective = WHOLE_MODEL,
) -> tuple[PyTree, Metrics, PyTree]:
    """Return (gradients, sums, router statistics) of a global batch, in a shard_map.

    Weighted exactly: the loss is the sum over all devices and microbatches divided by
    the number of tokens they hold together.
    """
    grads, (value, nll, tokens, aux), count = local_gradients(
        graphdef, held, batch, key, config, layout, objective
    )
    grads = layout.sum_gradients(grads)
    sums = {
        "objective": sum_over_devices(value),
        "loss": sum_over_devices(nll) / count,
        "tokens": sum_over_devices(tokens),
    }
    return grads, sums, jax.tree.map(agreed, aux)


def local_gradients(
    graphdef: nnx.GraphDef,
    held: Held,
    batch: Batch,
    key: jax.Array,
    config: ExperimentConfig,
    layout: Layout,
    objective: Objective,
) -> tuple[PyTree, tuple[Array, Array, Array, PyTree], Float[Array, ""]]:
    """Return a device's part of `gradients`, before devices with the same weights add
    theirs, (objective, nll, tokens, statistics), and the number of all tokens.
    """
    parallel = layout.parallel
    # Gradients of varying copies stay local until the one sum at the end.
    local = layout.vary(held.weights)
    count = jnp.maximum(sum_over_devices(jnp.sum(example_weights(batch))), 1.0)
    parts = example_weights(batch).shape[0]

    def value_of(local: PyTree, part: Batch, index: Array) -> tuple[Array, Any]:
        make_key = lambda: jax.random.fold_in(key, index)

        def loss(params: PyTree, buffers: PyTree, part: Batch) -> Any:
            model = nnx.merge(graphdef, parallel.gather_params(params), buffers)
            return batch_loss(
                model,
                part,
                config,
                key=make_key(),
                axis_name=parallel.token_axes,
                parallel=parallel,
                taught=taught,
            )

        taught = None if objective.teach is None else objective.teach(held.frozen, part)
        state = (local, held.buffers)
        sums, aux = objective.call(loss, state, held.frozen, part, make_key=make_key)
        value = sums.objective / count
        # Every device adds its part of what they all know.
        share = 1.0 / (parts * count_copies(value, parallel.sizes))
        value += share * router_losses(aux, config.model)
        return value, (sums.nll, count_tokens(part, config), aux)

    compute = jax.value_and_grad(value_of, has_aux=True)
    found, grads = _over_microbatches(compute, local, batch)
    return jax.tree.map(lambda g: g.astype(jnp.float32), grads), found, count


def _over_microbatches(
    compute: Callable[..., Any], local: PyTree, batch: Batch
) -> tuple[tuple[Array, Array, Array, PyTree], PyTree]:
    """Return (objective, nll, tokens, mean statistics) and gradients of all parts."""
    parts = example_weights(batch).shape[0]
    if parts == 1:
        first = jax.tree.map(lambda a: a[0], dict(batch))
        (value, extra), grads = compute(local, first, jnp.int32(0))
        return (value, *extra), grads

    def one(carry: PyTree, inputs: Any) -> tuple[PyTree, Any]:
        (value, extra), grads = compute(local, *inputs)
        add = lambda a, g: a + g.astype(a.dtype)
        return jax.tree.map(add, carry, grads), (value, *extra)

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), local)
    grads, outputs = jax.lax.scan(one, zeros, (dict(batch), jnp.arange(parts)))
    value, nll, tokens = (jnp.sum(o) for o in outputs[:3])
    aux = jax.tree.map(lambda a: jnp.mean(a, axis=0), outputs[3])
    return (value, nll, tokens, aux), grads


def step_key(config: ExperimentConfig, step: Int[Array, ""]) -> jax.Array:
    """Return the dropout key of a step; it depends on the seed and the step only."""
    return jax.random.fold_in(jax.random.key(config.train.seed), step)


def sum_over_devices(x: Array) -> Array:
    """Return the sum over devices; over data an unvarying value counts once each."""
    return total(x, (DATA_AXIS,))


def router_metrics(aux: Mapping[str, Any]) -> Metrics:
    """Return mean router losses and drop rate, and load, entropy and drop rate by
    layer, where layers route."""
    routed = {k: v for k, v in aux.items() if v}
    mean = lambda name: (
        jnp.mean(jnp.concatenate([v[name].reshape(-1) for v in routed.values()]))
        if routed
        else jnp.float32(0)
    )
    return {
        "balance_loss": mean("balance_loss"),
        "z_loss": mean("z_loss"),
        "dropped": mean("dropped"),
        "router": {
            part: {name: stats[name] for name in ("load", "entropy", "dropped")}
            for part, stats in routed.items()
        },
    }


def make_gradients(
    config: ExperimentConfig,
    graphdef: nnx.GraphDef,
    layout: Layout,
    objective: Objective = WHOLE_MODEL,
) -> Callable[..., tuple[PyTree, Metrics, PyTree]]:
    """Return (state, batch, step, frozen=None) -> (gradients, sums, router statistics).

    Gradients are laid out as the weights, the rest is the same on every device.
    """

    def compute(held: Held, batch: Batch, key: jax.Array) -> Any:
        return gradients(graphdef, held, batch, key, config, layout, objective)

    whole = PartitionSpec()
    return on_mesh(
        compute, lambda specs: (specs, whole, whole), config, layout, objective
    )


def on_mesh(
    compute: Callable[[Held, Batch, jax.Array], Any],
    out_specs: Callable[[PyTree], Any],
    config: ExperimentConfig,
    layout: Layout,
    objective: Objective,
) -> Callable[..., Any]:
    """Return (state, batch, step, frozen=None) -> what the devices compute of it.

    Each has its shards and the step's dropout key. `out_specs` are of the specs of the
    weights.
    """

    def run(state: TrainState, batch: Batch, step: Array, frozen: PyTree = None) -> Any:
        def body(
            weights: PyTree, buffers: PyTree, frozen: PyTree, step: Array, batch: Batch
        ) -> Any:
            key, held = step_key(config, step), Held(weights, buffers, frozen)
            return compute(held, batch, key)

        whole, specs = PartitionSpec(), layout.spec_tree(state.params)
        buffers = layout.spec_tree(state.buffers)
        sharded = jax.shard_map(
            body,
            mesh=layout.mesh,
            in_specs=(
                specs,
                buffers,
                objective.frozen_specs,
                whole,
                layout.batch_specs(batch),
            ),
            out_specs=out_specs(specs),
        )
        return sharded(state.params, state.buffers, frozen, step, dict(batch))

    return run


def make_step(
    config: ExperimentConfig,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    layout: Layout | None = None,
    objective: Objective = WHOLE_MODEL,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Return the jitted step (state, batch, frozen=None) -> (state, metrics).

    The state is donated. What is trained, and how the loss depends on it, is said by
    `layout` (of the state; None: of the whole model) and `objective`.

    A step whose loss or gradient isn't finite leaves parameters, optimizer and biases
    as they were; after `max_bad_steps` of them in a row nothing changes any more. With
    `max_loss_jump` so does a step whose loss jumps: metrics then have its `loss_limit`
    and how many `jumps` there were in a row.
    """
    schedule = make_schedule(config.optim, config.train.steps)
    layout = layout or layout_of(config, mesh)
    compute = make_gradients(config, graphdef, layout, objective)

    def step(
        state: TrainState, batch: Batch, frozen: PyTree = None
    ) -> tuple[TrainState, Metrics]:
        grads, sums, aux = compute(state, batch, state.step, frozen)
        if not config.model.scan_layers:
            # Stacks of gradients are put together once: XLA would do it again inside
            # the norm, where it took a quarter of a step on an H100.
            grads = jax.lax.optimization_barrier(grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(sums["objective"]) & jnp.isfinite(norm)
        keep = finite & (state.bad_steps < config.train.max_bad_steps)
        applied, level, jumps = keep, state.loss_level, {}
        if level is not None and (factor := config.train.max_loss_jump) is not None:
            jumps = {"loss_limit": loss_limit(level, factor)}
            level, jumped = follow_loss(level, sums["loss"], keep, factor)
            applied = keep & ~jumped
            jumps["jumps"] = jnp.where(jumped, level.jumps, 0)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, step=state.step
        )
        changed = {
            "params": optax.apply_updates(state.params, updates),
            "opt_state": opt_state,
            "buffers": objective.update_buffers(state.buffers, aux, config.model),
        }
        if state.ema is not None:
            decay = config.optim.ema_decay
            changed["ema"] = follow_weights(
                state.ema, changed["params"], state.step, decay
            )
        chosen = {
            name: jax.tree.map(
                lambda new, old: jnp.where(applied, new, old),
                tree,
                getattr(state, name),
            )
            for name, tree in changed.items()
        }
        bad_steps = jnp.where(keep, 0, state.bad_steps + 1)
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            bad_steps=bad_steps,
            loss_level=level,
            **chosen,
        )
        metrics = {
            "loss": sums["loss"],
            "grad_norm": norm,
            "lr": schedule(state.step),
            "tokens": sums["tokens"],
            "bad_steps": bad_steps,
            **jumps,
            **router_metrics(aux),
        }
        return new, metrics

    return jax.jit(step, donate_argnums=0)
