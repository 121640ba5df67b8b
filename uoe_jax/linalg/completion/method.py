"""How half-steps are solved: the solver, the penalties, and what both tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from uoe_jax.errors import ConfigError, nearest
from uoe_jax.linalg.completion.defaults import SOLVERS
from uoe_jax.linalg.sketch import SKETCHES

AXIS = "data"  # of a mesh, over which entries are split
PRECISIONS = ("highest", "default")


@dataclass(frozen=True)
class Solver:
    """How the least-squares problems of a half-step are solved."""

    kind: str = "auto"
    max_steps: int = 50
    sketch: str = "countsketch"
    sketch_factor: int = 4  # rows of a sketch per unknown
    gram_precision: str = "highest"  # of A^T A; "default" is TF32 on a GPU
    low_precision: bool = False  # iterate on a bfloat16 copy of A, half the bytes

    def __post_init__(self):
        for name, value, known in (
            ("solver", self.kind, SOLVERS),
            ("sketch", self.sketch, SKETCHES),
            ("gram_precision", self.gram_precision, PRECISIONS),
        ):
            if value not in known:
                raise ConfigError(f"{name} is {value!r}; {nearest(value, known)}")
        for name in ("max_steps", "sketch_factor"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; it must be at least 1"
                )

    def choose(self, width: int, rank: int) -> str:
        """Return the solver for problems of `width` equations in `rank` unknowns.

        Few equations per unknown condition the problem badly, and small Gram matrices
        are cheap: there the direct solver wins.
        """
        if self.kind != "auto":
            return self.kind
        return "exact" if rank <= 64 or width < 10 * rank else "cg"


@dataclass(frozen=True)
class Method:
    """What a compiled run depends on beside shapes."""

    solver: Solver
    regularised: bool
    biases: bool
    mesh: Mesh | None = None  # devices that share the entries, over AXIS

    @property
    def axis_name(self) -> str | None:
        """The mesh axis that sums go over, inside the compiled functions."""
        return None if self.mesh is None else AXIS


class Penalties(NamedTuple):
    """Numbers that need no new compilation; n_j is an unknown's summed weight."""

    ridge: Float[Array, ""]  # the penalty is ridge * n_j**power
    bias_ridge: Float[Array, ""]
    power: Float[Array, ""]
    tol: Float[Array, ""]  # accuracy of an iterative half-step


class Stats(NamedTuple):
    """What a half-step saw and spent."""

    loss: Float[Array, ""]  # weighted squared error before the half-step
    max_steps: Int[Array, ""]  # iterations of the slowest problem
    entry_steps: Float[Array, ""]  # iterations summed over entries
    unknown_steps: Float[Array, ""]  # iterations summed over unknowns


class FixedFactor(NamedTuple):
    """The factor a half-step holds: its design matrix and what it needs beside it."""

    design: Float[Array, "M R"]
    shift: Float[Array, " M"]  # subtracted from the values
    scale: Float[Array, " R"]  # mean square of the design's columns


def gather(array: Array, index: Array) -> Array:
    """Return rows of `array`; zeros where the index is past the end."""
    return array.at[index].get(mode="fill", fill_value=0)


def summed(x: Array, axis_name: str | None) -> Array:
    """Return the sum over the devices of a mesh axis, if any."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def make_penalties(
    ridge: float, bias_ridge: float | None, power: float, tol: Any, dtype: Any
) -> Penalties:
    """Return the numbers of a half-step in one dtype; biases default to `ridge`."""
    bias_ridge = ridge if bias_ridge is None else bias_ridge
    return Penalties(*(jnp.asarray(x, dtype) for x in (ridge, bias_ridge, power, tol)))


def ridge_of(
    penalties: Penalties, degree: Float[Array, " C"], width: int, method: Method
) -> Float[Array, "C R"]:
    """Return the ridge of each unknown's `width` coefficients, the bias the last."""
    grow = jnp.where(degree > 0, degree, 1) ** penalties.power
    ridge = jnp.broadcast_to(penalties.ridge, (width - method.biases,))
    if method.biases:
        ridge = jnp.concatenate([ridge, penalties.bias_ridge[None]])
    return grow[:, None] * ridge[None, :]
