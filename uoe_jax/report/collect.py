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
from uoe_jax.report.read import BLOCKS, num_experts, num_shared, routed_layers

_TOKENS = 384  # enough to read; more would only be small


def collect_overlay(
    module: Any, config: ExperimentConfig, dataset: Any
) -> Overlay | None:
    """Return the experts chosen in a piece of validation data; None if none route.

    Text is taken from the middle of the split, in neighbouring rows of the model's
    sequence length.
    """
    layers = {block: routed_layers(config.model, block) for block in BLOCKS}
    layers = {block: rows for block, rows in layers.items() if rows}
    if not layers:
        return None
    batch = _example(config, dataset)
    vision = config.model.kind == "vision"
    inputs = batch["images"] if vision else batch["tokens"]
    options = {}
    if config.model.kind == "encoder":  # the rest of the row is padding
        options["segments"] = jnp.asarray(batch["segments"])
    # Of the same arrays. One row costs little; to compile each layer costs much.
    module = jax.tree.map(lambda leaf: leaf, module)
    module.trunk.scan_layers = module.trunk.alike
    graphdef, state = nnx.split(module)

    @jax.jit
    def choose(state: Any, inputs: jax.Array) -> dict[str, jax.Array]:
        return routing_choices(nnx.merge(graphdef, state), inputs, **options)

    found = choose(state, jnp.asarray(inputs))
    model = config.model
    first = int(vision and model.class_token)  # a picture shows patches
    shared = {b: num_shared(model, b, rows[0]) for b, rows in layers.items()}
    number = {
        b: max(num_shared(model, b, i) + num_experts(model, b, i) for i in rows)
        for b, rows in layers.items()
    }
    return Overlay(
        choices={
            block: _join_rows(np.asarray(found[block])[:, :, first:, shared[block] :])
            for block in layers
        },
        layers=layers,
        num_experts=number,
        tokens=[] if vision else [dataset.decode([int(i)]) for i in inputs.ravel()],
        image=np.asarray(inputs[0]) if vision else None,
        patch=model.image_patch,
    )


def _example(config: ExperimentConfig, dataset: Any) -> dict[str, np.ndarray]:
    """Return a batch of one row, or of the rows that make up `_TOKENS` of text."""
    rows = 1
    if config.model.kind == "decoder":
        rows = min(max(_TOKENS // config.seq_len, 1), dataset.num_examples)
    first = (dataset.num_examples - rows) // 2
    batch = dataset.examples(np.arange(first, first + rows))
    cut = ("tokens", "segments")
    return {k: v[:, :_TOKENS] if k in cut else v for k, v in batch.items()}


def _join_rows(choices: np.ndarray) -> np.ndarray:
    """Return choices [L, B, T, X] as [L, B*T, X]."""
    return choices.reshape(len(choices), -1, choices.shape[-1])
