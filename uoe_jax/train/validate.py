"""Validation: loss, accuracy and router statistics over whole batches of a split."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, PyTree

from uoe_jax.config import ExperimentConfig
from uoe_jax.data import Dataset, prefetch
from uoe_jax.partition.collectives import Parallel, agreed
from uoe_jax.partition.layout import Layout
from uoe_jax.runs.state import layout_of
from uoe_jax.train.feed import whole_batch
from uoe_jax.train.loss import class_losses, output_layer, token_scores
from uoe_jax.train.step import (
    Batch,
    example_weights,
    hidden_states,
    loss_tokens,
    router_metrics,
    scored_tokens,
    sum_over_devices,
)
from uoe_jax.train.subject import WHOLE_MODEL, Objective

EvalStep = Callable[..., dict[str, Any]]


def batch_scores(
    model: Any,
    batch: Batch,
    config: ExperimentConfig,
    parallel: Parallel | None = None,
) -> tuple[Array, Array, PyTree]:
    """Return (summed nll, summed correctness, router statistics) of one batch."""
    axis_name = None if parallel is None else parallel.token_axes
    options: dict[str, Any] = {"axis_name": axis_name, "parallel": parallel}
    options["scored"] = scored_tokens(batch, config)
    weights = example_weights(batch)
    kind = config.model.kind
    if kind == "decoder":
        x, aux = hidden_states(model, batch, config, **options)
        x, targets, weights = loss_tokens(x, batch["targets"], weights, parallel)
        nll, correct = token_scores(
            x.reshape(-1, x.shape[-1]),
            *output_layer(model),
            targets.reshape(-1),
            config.train.loss_chunk,
        )
        weights = weights.reshape(-1)
        return jnp.sum(nll * weights), jnp.sum(correct * weights), aux
    if kind == "encoder":
        logits, aux = model(batch["tokens"], segments=batch["segments"], **options)
    else:
        logits, aux = model(batch["images"], **options)
    nll = class_losses(logits, batch["labels"], weights).nll
    correct = jnp.argmax(logits, axis=-1) == batch["labels"]
    return nll, jnp.sum(correct * weights), aux


def make_eval_step(
    config: ExperimentConfig,
    graphdef: nnx.GraphDef,
    mesh: Mesh,
    layout: Layout | None = None,
    objective: Objective = WHOLE_MODEL,
) -> EvalStep:
    """Return the jitted (weights, buffers, batch, frozen=None) -> sums over one global
    batch; `layout` is of the weights, None: of the whole model."""
    layout = layout or layout_of(config, mesh)
    parallel = layout.parallel

    def body(
        weights: PyTree, buffers: PyTree, frozen: PyTree, batch: Batch
    ) -> dict[str, Any]:
        batch = jax.tree.map(lambda a: a[0], dict(batch))

        def scores(params: PyTree, buffers: PyTree, batch: Batch) -> Any:
            model = nnx.merge(graphdef, parallel.gather_params(params), buffers)
            return batch_scores(model, batch, config, parallel)

        nll, correct, aux = objective.call(scores, (weights, buffers), frozen, batch)
        sums = {
            "nll": nll,
            "correct": correct,
            "weight": jnp.sum(example_weights(batch)),
        }
        scored = scored_tokens(batch, config)
        if scored is not None:
            sums["scored"] = jnp.sum(scored.astype(jnp.float32))
        return {
            **jax.tree.map(sum_over_devices, sums),
            **router_metrics(jax.tree.map(agreed, aux)),
        }

    def run(
        weights: PyTree, buffers: PyTree, batch: Batch, frozen: PyTree = None
    ) -> dict[str, Any]:
        specs = [layout.spec_tree(tree) for tree in (weights, buffers)]
        sharded = jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(*specs, objective.frozen_specs, layout.batch_specs(batch)),
            out_specs=PartitionSpec(),
        )
        return sharded(weights, buffers, frozen, dict(batch))

    return jax.jit(run)


def run_validation(
    step: EvalStep,
    params: PyTree,
    buffers: PyTree,
    data: Dataset,
    mesh: Mesh,
    max_batches: int | None = None,
    frozen: PyTree = None,
) -> dict[str, Any]:
    """Return loss (nats), perplexity, bits per byte, accuracy and router statistics.

    Every scored token or example counts once, bytes are those of the scored tokens;
    router statistics are means over the scored tokens, of the balance loss, which each
    batch has of its own, over batches by their scored tokens.
    """
    outputs, num_bytes = [], 0.0
    count = min(max_batches or data.num_batches, data.num_batches)
    for batch in prefetch(data.batch, 0, count):
        outputs.append(step(params, buffers, whole_batch(batch, mesh), frozen))
        num_bytes += data.count_bytes(batch) or 0.0
    outputs = jax.device_get(outputs)
    total = {
        name: sum(float(o[name]) for o in outputs)
        for name in ("nll", "correct", "weight")
    }
    weight = max(total["weight"], 1.0)
    loss = total["nll"] / weight
    shares = np.array([float(o.get("scored", 1)) for o in outputs])
    shares /= max(shares.sum(), 1.0)
    mean = lambda *leaves: np.tensordot(shares, np.stack(leaves), 1).tolist()
    routing = [{k: o[k] for k in ("balance_loss", "z_loss", "router")} for o in outputs]
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": (
            total["nll"] / math.log(2) / num_bytes if num_bytes else None
        ),
        "accuracy": total["correct"] / weight,
        **jax.tree.map(mean, *routing),
    }
