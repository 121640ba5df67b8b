"""An adapter as what a run trains: its factors, beside the frozen model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PyTree

from uoe_jax.adapt.adapters import Adapters, Weights
from uoe_jax.adapt.apply import apply_adapted
from uoe_jax.adapt.config import Path
from uoe_jax.adapt.layout import adapter_specs
from uoe_jax.config import ExperimentConfig
from uoe_jax.hardware.count import flops_per_token
from uoe_jax.partition.layout import Layout
from uoe_jax.runs.state import TrainState, first_level, first_mean, layout_of
from uoe_jax.train.subject import MakeKey, Objective, Subject, freeze_params
from uoe_jax.weights import EXPERT


def adapter_layout(adapters: Adapters, model: Layout) -> Layout:
    """Return the layout of an adapter's arrays: each is split as its weight is.

    Rank axes are whole. What a weight's shards hold of the delta is then the product of
    the factors' own shards.
    """
    specs, shapes, experts = {}, {}, {}
    for name, parts in adapter_specs(adapters, model.specs).items():
        plan = adapters[name]
        for part, word in plan.labels:
            key = f"{name}.{part}"
            specs[key], shapes[key] = parts[part], plan.shapes[part]
            if name in model.experts and EXPERT in word:
                experts[key] = word.index(EXPERT)
    return dataclasses.replace(model, specs=specs, shapes=shapes, experts=experts)


def adapter_objective(
    adapters: Adapters, model: Layout, frozen: Mapping[str, Any], path: Path
) -> Objective:
    """Return how the model's loss depends on an adapter's factors.

    `frozen` has the model's `params` and `buffers` and the adapter's `scales`. Routers'
    balance biases stay as they are.
    """
    dropped = any(plan.dropout for plan in adapters.plans)

    def call(
        fn: Callable[..., Any],
        state: tuple[Weights, Weights],
        frozen: Mapping[str, Any],
        *args: Any,
        make_key: MakeKey | None = None,
    ) -> Any:
        weights, anchor = state
        key = None
        if make_key is not None and dropped:
            key = jax.random.fold_in(make_key(), 1)
        return apply_adapted(
            lambda params, *args: fn(params, frozen["buffers"], *args),
            frozen["params"],
            dataclasses.replace(
                adapters, weights=weights, anchor=anchor, scales=frozen["scales"]
            ),
            *args,
            path=path,
            training=make_key is not None,
            key=key,
            specs=model.specs,
        )

    return Objective(
        call=call,
        update_buffers=lambda buffers, aux, config: buffers,
        frozen_specs={
            "params": model.spec_tree(frozen["params"]),
            "buffers": model.spec_tree(frozen["buffers"]),
            "scales": PartitionSpec(),
        },
    )


def adapter_subject(
    adapters: Adapters,
    base: tuple[nnx.GraphDef, PyTree, PyTree],
    config: ExperimentConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    *,
    path: Path = "auto",
) -> Subject:
    """Return what training an adapter of `base` (graphdef, params, buffers) takes.

    The state holds the factors and their moments, and the start that a `hosvd` adapter
    subtracts; nothing of the base.
    """
    graphdef, params, buffers = base
    model = layout_of(config, mesh)
    params = freeze_params(params, config)
    layout = adapter_layout(adapters, model)
    frozen = {
        "params": model.place(model.to_memory(params)),
        "buffers": model.place(buffers),
        "scales": layout.place(adapters.scales),
    }
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=adapters.weights,
        opt_state=optimizer.init(adapters.weights),
        buffers=adapters.anchor,
        bad_steps=jnp.zeros((), jnp.int32),
        loss_level=first_level(config.train),
        ema=first_mean(config.optim, adapters.weights),
    )
    return Subject(
        graphdef=graphdef,
        state=layout.place(layout.to_memory(state)),
        layout=layout,
        optimizer=optimizer,
        # Frozen weights have no gradients; the factors' own products are left out.
        flops_per_token=2 * flops_per_token(config.model, config.seq_len).forward,
        objective=adapter_objective(adapters, model, frozen, path),
        frozen=frozen,
        validate_start=True,
    )
