"""Compiled starts and sweeps, over one device or many."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from uoe_jax.linalg.completion.half import Hyper, Stats
from uoe_jax.linalg.completion.layout import Problem, Side
from uoe_jax.linalg.completion.solver import Solver
from uoe_jax.linalg.completion.spectral import spectral_start
from uoe_jax.linalg.completion.step import State, sweep

AXIS = "data"


@dataclass(frozen=True)
class Method:
    """What a compiled run depends on beside shapes."""

    solver: Solver
    regularised: bool
    biases: bool


@functools.cache
def compiled_start(
    method: Method, mesh: Mesh | None, rank: int, clip_mu: float, passes: int
) -> Any:
    """Return the jitted spectral start; over a mesh, entries are split."""
    run = partial(
        spectral_start,
        rank=rank,
        clip_mu=clip_mu,
        passes=passes,
        regularised=method.regularised,
        biases=method.biases,
        axis_name=None if mesh is None else AXIS,
    )
    return _over(mesh, run, 1)


@functools.cache
def compiled_sweep(method: Method, mesh: Mesh | None) -> Any:
    """Return the jitted sweep; over a mesh, entries are split and factors are not."""
    run = partial(
        sweep,
        solver=method.solver,
        regularised=method.regularised,
        biases=method.biases,
        axis_name=None if mesh is None else AXIS,
    )
    return _over(mesh, run, 3)


def _over(mesh: Mesh | None, run: Callable, num_others: int) -> Any:
    if mesh is None:
        return jax.jit(run)
    split: Any = PartitionSpec(AXIS)  # specs stand where a problem has arrays
    whole: Any = PartitionSpec()
    side = Side(split, whole)
    specs = (Problem(side, side, whole), *[whole] * num_others)
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=whole))


def place(problem: Problem, mesh: Mesh | None) -> Problem:
    """Put a problem's equations over the mesh's data axis, the rest everywhere."""
    if mesh is None:
        return problem
    split = NamedSharding(mesh, PartitionSpec(AXIS))
    whole = NamedSharding(mesh, PartitionSpec())

    def put(side: Side) -> Side:
        return Side(
            jax.device_put(side.blocks, split), jax.device_put(side.degree, whole)
        )

    return Problem(
        put(problem.rows), put(problem.cols), jax.device_put(problem.offset, whole)
    )


def start_state(
    problem: Problem,
    key: Key[Array, ""],
    method: Method,
    mesh: Mesh | None,
    *,
    rank: int,
    clip_mu: float,
    passes: int,
) -> tuple[State, Array]:
    """Return the spectral start and the singular values behind it."""
    method = dataclasses.replace(method, solver=Solver())  # which plays no part here
    return compiled_start(method, mesh, rank, clip_mu, passes)(problem, key)


def run_sweep(
    problem: Problem,
    state: State,
    hyper: Hyper,
    key: Key[Array, ""],
    method: Method,
    mesh: Mesh | None = None,
) -> tuple[State, tuple[Stats, Stats]]:
    """Run one compiled sweep."""
    return compiled_sweep(method, mesh)(problem, state, hyper, key)
