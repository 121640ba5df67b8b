"""Whole training steps for the ahead-of-time command: presets, layouts, TPUs."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from uoe_jax.config import ExperimentConfig, MeshConfig
from uoe_jax.optim import make_optimizer
from uoe_jax.partition.mesh import mesh_for
from uoe_jax.plan import aot
from uoe_jax.presets import get_preset
from uoe_jax.runs.state import abstract_state
from uoe_jax.train.ahead import abstract_batch
from uoe_jax.train.step import make_step

LAYOUTS = {
    "data 4": MeshConfig(data=4),
    "fsdp 4": MeshConfig(data=1, fsdp=4),
    "fsdp 2, tensor 2": MeshConfig(data=1, fsdp=2, tensor=2),
}


@dataclass(frozen=True)
class Step:
    """A preset's step in a layout, with so many sequences a batch."""

    preset: str
    layout: str
    batch: int
    only: str | None = None  # the one generation it is compiled for; None: all


STEPS = {
    f"{step.preset}, {step.layout}": step
    for step in (
        Step("1b-union", "fsdp 4", 4),
        Step("small-union", "data 4", 16),
        Step("1b", "fsdp 4", 4),
        Step("small", "data 4", 16),
        # More layouts where the chips are largest: they change what is sent, not the
        # kernels.
        Step("1b-union", "fsdp 2, tensor 2", 4, "v5p"),
        Step("1b", "fsdp 2, tensor 2", 4, "v5p"),
        Step("1b-union", "data 4", 4, "v5p"),
    )
}


def step_config(case: Step) -> ExperimentConfig:
    """Return the preset with this batch and layout.

    Layers are scanned: unrolled ones would compile the same kernels again and again.
    """
    config = get_preset(case.preset)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, scan_layers=True),
        data=dataclasses.replace(config.data, batch_size=case.batch),
        mesh=LAYOUTS[case.layout],
    )


def lower_step(case: Step, name: str) -> tuple[Any, Any]:
    """Return the lowered step and its mesh."""
    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)
    config = step_config(case)
    mesh = mesh_for(config, aot.topology_devices(aot.TOPOLOGIES[name]))
    optimizer = make_optimizer(config.optim, config.train.steps)
    graphdef, state = abstract_state(config, optimizer, mesh)
    step = make_step(config, graphdef, optimizer, mesh)
    return aot.lower_for(step, state, abstract_batch(config, mesh), mesh=mesh), mesh


def compile_step(case: Step, name: str, dumps: Path) -> dict[str, Any]:
    """Compile a whole training step; return its figures, or why it doesn't fit."""
    del dumps
    start = time.perf_counter()
    lowered, mesh = lower_step(case, name)
    tokens = case.batch * step_config(case).seq_len
    # XLA's cost model counts the body of the loop over layers once.
    layers = step_config(case).model.num_layers
    figures = {"batch_tokens": tokens, "layout": case.layout, "looped_layers": layers}
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # Too large for the chip is an answer, not a failure of the command.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return figures | {"refused": str(error).splitlines()[0][:300]}
    compiled = aot.describe(executable, aot.TOPOLOGIES[name], mesh).as_dict()
    seconds = round(time.perf_counter() - start, 1)
    held = rows_of_x(executable, case)
    return figures | compiled | held | {"compile_seconds": seconds}


def rows_of_x(executable: Any, case: Step) -> dict[str, Any]:
    """Return the most rows as wide as x that the step holds, beside what E copies take.

    x is [tokens, D] on each device. A routed layer needs X rows for each token; a copy
    of x for each expert would be E rows for each token. Stacks over the layers count
    by layer, and the vocabulary's embeddings don't.
    """
    config, sizes = step_config(case), LAYOUTS[case.layout]
    model = config.model
    tokens = case.batch * config.seq_len // (max(sizes.data, 1) * sizes.fsdp)
    most = 0
    for sides in aot.buffer_shapes(executable):
        tails = [math.prod(sides[at:]) for at in range(1, len(sides))]
        if model.d_model in tails and model.vocab_size not in sides:
            layers = model.num_layers if sides[0] == model.num_layers else 1
            most = max(most, math.prod(sides) // model.d_model // layers)
    experts = model.union.num_experts // sizes.tensor
    return {"rows_of_x": most, "tokens": tokens, "rows_of_e_copies": experts * tokens}
