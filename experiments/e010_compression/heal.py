"""A cut that is healed: written as a run, LoRA trained on it, the deltas added."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from uoe_jax.adapt.config import AdapterConfig
from uoe_jax.adapt.files import load_adapters
from uoe_jax.adapt.merge import merge
from uoe_jax.adapt.request import AdaptRequest
from uoe_jax.adapt.run import adapt_run
from uoe_jax.compress.observed import Smaller
from uoe_jax.data.record import carried_record
from uoe_jax.model import flat_buffers, flat_params
from uoe_jax.runs.load import load_run
from uoe_jax.runs.write import Origin, write_run

RATE = 1e-3
_POINTS = 20  # of a loss curve


class Healed(NamedTuple):
    """A model before and after, its losses while it trained, and the seconds."""

    models: tuple[tuple[str, Smaller], ...]
    losses: list[float]
    seconds: float


def write_cut(dense: Path, out: Path, made: Smaller) -> None:
    """Write a model that was cut as a run that trains on as the dense one does."""
    config = load_run(dense).config
    # A cut computes in float32 while it is made; it trains as the dense run does.
    model = dataclasses.replace(made.config, compute_dtype=config.model.compute_dtype)
    config = dataclasses.replace(config, model=model)
    origin = Origin(
        made_by="compress", source=str(dense), data=carried_record(dense, config)
    )
    write_run(out, config, made.params, origin, buffers=made.buffers)


def heal(made: Path, out: Path, steps: int, rank: int) -> Healed:
    """Train LoRA on a run's own data and add it; a second call goes on with it."""
    adapter = AdapterConfig(method="lora", rank=rank)
    request = AdaptRequest(adapter=adapter, steps=steps, learning_rate=RATE)
    report = adapt_run(made, out, request, quiet=True)
    run = load_run(made)
    config, params, buffers = (
        run.config.model,
        flat_params(run.model),
        flat_buffers(run.model),
    )
    adapters, _ = load_adapters(out, nnx.split(run.model, nnx.Param, ...)[1])
    on_device: dict[str, Any] = {n: jnp.asarray(a) for n, a in params.items()}
    merged = {n: np.asarray(a) for n, a in merge(on_device, adapters).params.items()}
    models = (
        ("before", Smaller(config, params, buffers)),
        ("after", Smaller(config, merged, buffers)),
    )
    losses = report["losses"]
    curve = losses[:: max(len(losses) // _POINTS, 1)]
    return Healed(models, curve, report["seconds"])
