"""The training step of a layout, compiled or traced for devices that aren't here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from uoe_jax.config import ExperimentConfig, MeshConfig
from uoe_jax.optim import make_optimizer
from uoe_jax.partition.layout import batch_spec
from uoe_jax.partition.mesh import mesh_for
from uoe_jax.plan.aot import Compiled, compile_for, topology_devices
from uoe_jax.runs.state import abstract_state
from uoe_jax.train.step import make_step


def with_mesh(config: ExperimentConfig, sizes: Mapping[str, int]) -> ExperimentConfig:
    """Return the experiment on a mesh of these sizes."""
    return dataclasses.replace(config, mesh=MeshConfig(**sizes))


def abstract_batch(config: ExperimentConfig, mesh: Mesh) -> dict[str, Any]:
    """Return the shapes of a batch on a mesh, as `put_batch` gives it."""
    model, parts = config.model, config.train.accumulate
    rows = config.data.batch_size // parts
    lead, label = (parts, rows), jnp.int32
    tokens = (*lead, config.seq_len)
    shapes: dict[str, tuple[tuple[int, ...], Any]]
    if model.kind == "vision":
        side = model.image_size
        images = (*lead, side, side, model.image_channels)
        shapes = {"images": (images, jnp.float32), "labels": (lead, label)}
    elif model.kind == "encoder":
        shapes = {"tokens": (tokens, label), "segments": (tokens, label)}
        shapes["labels"] = (lead, label)
    else:
        names = ("tokens", "targets", "positions", "segments")
        shapes = {name: (tokens, label) for name in names}
        shapes["mask"] = (tokens, jnp.float32)
    return {
        name: jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, batch_spec(mesh, len(shape)))
        )
        for name, (shape, dtype) in shapes.items()
    }


def _step(config: ExperimentConfig, devices: Sequence[Any]) -> tuple[Any, ...]:
    mesh = mesh_for(config, devices)
    optimizer = make_optimizer(config.optim, config.train.steps)
    graphdef, state = abstract_state(config, optimizer, mesh)
    step = make_step(config, graphdef, optimizer, mesh)
    return step, state, abstract_batch(config, mesh), mesh


def compile_step(
    config: ExperimentConfig, topology: str, outline: bool = False
) -> Compiled:
    """Return what the TPU compiler says of an experiment's training step.

    With `outline` its kernels are compiled without their bodies: a fraction of the time
    for the same memory and collectives; see `aot.outlined`.

    Raises:
      ConfigError: the layout isn't legal, or no such topology.
      jax.errors.JaxRuntimeError: the compiler's refusal, such as too little memory.
    """
    step, state, batch, mesh = _step(config, topology_devices(topology))
    return compile_for(
        step, state, batch, topology=topology, mesh=mesh, outline=outline
    )
