"""MLC's two trainings, each a step that is compiled once for all with its settings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

from uoe_jax.cluster.objective import start_value, value


class Step(NamedTuple):
    """One step of Adam: its memory's start, and the step itself."""

    memory: Callable[[Any], Any]  # (weights)
    # (weights, memory, points, key) -> weights, memory, loss
    run: Callable[[Any, Any, Any, Any], Any]


@functools.cache
def start_step(graph: Any, knobs: tuple[float, ...], rate: float) -> Step:
    """Return the start's step: features spread out, and the same for both views.

    `graph` is the network's; `knobs` are eps2, the invariance's weight, the noise.
    """
    eps2, invariance, noise = knobs

    def loss(state: Any, views: Any) -> Any:
        net = nnx.merge(graph, state)
        return -start_value((net(views[0])[0], net(views[1])[0]), eps2, invariance)

    return _step(loss, noise, rate)


@functools.cache
def main_step(graph: Any, knobs: tuple[Any, ...], rate: float) -> Step:
    """Return the step that maximises R - Rc.

    `knobs` are eps2, eta, gamma, whether affinities are absolute, the noise.
    """
    eps2, eta, gamma, absolute, noise = knobs

    def loss(state: Any, views: Any) -> Any:
        net = nnx.merge(graph, state)
        (z, c), (z2, c2) = net(views[0]), net(views[1])
        settings = {"eps2": eps2, "eta": eta, "gamma": gamma, "absolute": absolute}
        return -value((z, z2), (c, c2), **settings)

    return _step(loss, noise, rate)


def _step(loss: Any, deviation: float, rate: float) -> Step:
    optimizer = optax.adam(rate)

    @jax.jit
    def run(state: Any, memory: Any, points: Any, key: Any) -> Any:
        noise = deviation * jax.random.normal(key, (2, *points.shape))
        found, slope = jax.value_and_grad(loss)(state, points[None] + noise)
        change, memory = optimizer.update(slope, memory)
        return optax.apply_updates(state, change), memory, found

    return Step(optimizer.init, run)
