"""Routing of a real validation example, from a loaded model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uoe_jax.config import ExperimentConfig
from uoe_jax.model import routing_choices
from uoe_jax.report.overlay import Overlay
from uoe_jax.report.read import BLOCKS, routed_layers

_TOKENS = 320  # enough to read; more would only be small


def collect_overlay(
    model: nnx.Module, config: ExperimentConfig, dataset: Any
) -> Overlay | None:
    """Return the experts chosen in the first validation example; None if none route."""
    layers = {block: routed_layers(config.model, block) for block in BLOCKS}
    layers = {block: rows for block, rows in layers.items() if rows}
    if not layers:
        return None
    batch = dataset.batch(0)
    vision = config.model.kind == "vision"
    inputs = batch["images"][:1] if vision else batch["tokens"][:1, :_TOKENS]
    options = {}
    if config.model.kind == "encoder":  # the rest of the row is padding
        options["segments"] = jnp.asarray(batch["segments"][:1, :_TOKENS])
    graphdef, state = nnx.split(model)

    @jax.jit
    def choose(state: Any, inputs: jax.Array) -> dict[str, jax.Array]:
        return routing_choices(nnx.merge(graphdef, state), inputs, **options)

    found = choose(state, jnp.asarray(inputs))
    moe = "moe" in config.model.mlp
    number = {
        "attention": config.model.union.num_experts,
        "mlp": config.model.moe.num_experts if moe else config.model.union.num_experts,
    }
    return Overlay(
        choices={block: np.asarray(found[block])[:, 0] for block in layers},
        layers=layers,
        num_experts={block: number[block] for block in layers},
        tokens=[] if vision else [dataset.decode([int(i)]) for i in inputs[0]],
        image=np.asarray(inputs[0]) if vision else None,
        patch=config.model.image_patch,
    )
