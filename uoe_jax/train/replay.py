"""Gradients computed twice: a device that computes wrongly gives other bits.

Needs kernels that are deterministic. Those of a GPU that add with atomic operations
aren't: start it with XLA_FLAGS=--xla_gpu_deterministic_ops=true.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PyTree, UInt32

from uoe_jax.config import ExperimentConfig
from uoe_jax.errors import ReplayError
from uoe_jax.partition.layout import Layout
from uoe_jax.runs.state import TrainState
from uoe_jax.train.step import Batch, Held, local_gradients, on_mesh
from uoe_jax.train.subject import Objective, Subject
from uoe_jax.tree import named_leaves

_SHOWN = 3  # tensors spelled out for a device

Replay = Callable[[TrainState, Batch, PyTree, int], None]


def make_replay(config: ExperimentConfig, subject: Subject) -> Replay:
    """Return (state, batch, frozen, step) -> None, which computes gradients twice.

    It raises ReplayError where any bit differs, with the step, the devices and the
    tensors. Each process looks at its own devices.
    """
    checksums = jax.jit(
        gradient_checksums(config, subject.graphdef, subject.layout, subject.objective)
    )

    def replay(state: TrainState, batch: Batch, frozen: PyTree, step: int) -> None:
        first, second = (
            jax.block_until_ready(checksums(state, batch, state.step, frozen))
            for _ in range(2)
        )
        # A sum gives all devices the bits of the one that was wrong.
        for when in ("local", "summed"):
            if found := _differing(first[when], second[when]):
                raise ReplayError(_explain(step, found, when))

    return replay


def gradient_checksums(
    config: ExperimentConfig,
    graphdef: nnx.GraphDef,
    layout: Layout,
    objective: Objective,
) -> Callable[..., dict[str, PyTree]]:
    """Return (state, batch, step, frozen=None) -> checksums [devices] of each gradient.

    `local`: of what each device computes; `summed`: of what its optimizer would get.
    """

    def compute(held: Held, batch: Batch, key: jax.Array) -> dict[str, PyTree]:
        local, _, _ = local_gradients(
            graphdef, held, batch, key, config, layout, objective
        )
        summed = layout.sum_gradients(local)
        sums = {"local": local, "summed": summed}
        return jax.tree.map(lambda leaf: checksum(leaf)[None], sums)

    everywhere = PartitionSpec(layout.mesh.axis_names)
    return on_mesh(compute, lambda specs: everywhere, config, layout, objective)


def checksum(array: Float[Array, ...]) -> UInt32[Array, ""]:
    """Return 32 bits that change with any one bit of an array in float32.

    Every number counts an odd number of times, so no power of two is lost.
    """
    bits = jax.lax.bitcast_convert_type(array, jnp.uint32).reshape(-1)
    odd = 2 * jax.lax.iota(jnp.uint32, bits.size) + 1
    return jnp.sum(bits * odd, dtype=jnp.uint32)


def _differing(first: PyTree, second: PyTree) -> dict[jax.Device, list[str]]:
    """Return the names of the gradients that differ, by this process's devices."""
    found: dict[jax.Device, list[str]] = {}
    others = named_leaves(second)
    for name, array in named_leaves(first).items():
        pairs = zip(
            array.addressable_shards, others[name].addressable_shards, strict=True
        )
        for one, other in pairs:
            if np.asarray(one.data) != np.asarray(other.data):
                found.setdefault(one.device, []).append(name)
    return found


def _explain(step: int, found: dict[Any, list[str]], when: str) -> str:
    devices = []
    for device, names in found.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        listed = ", ".join(names[:_SHOWN]) + more
        devices.append(f"{device.device_kind} {device.id} in {listed}")
    where = "" if when == "local" else " once they are summed over the devices"
    return (
        f"step {step}: gradients of the same weights and batch had other bits the "
        f"second time{where}, on {'; on '.join(devices)}; nothing of the step is kept: "
        "leave that device out and run the same command again (train.replay_every 0 "
        "where kernels aren't deterministic)"
    )
