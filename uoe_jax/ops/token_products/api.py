"""Products of single tokens, one a row of a batch, with the experts they picked.

While a model decodes, a product is as fast as its weights are read: nothing is packed,
and no weights are read but those that some token uses. A dense layer is one expert
that every token picks.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from uoe_jax.errors import ConfigError, nearest
from uoe_jax.ops.dispatch import dispatch
from uoe_jax.ops.token_products import xla
from uoe_jax.ops.token_products.nvidia import triton

BACKENDS = {"triton": triton.project, "xla": xla.project}
ADD_BACKENDS = {"triton": triton.add, "xla": xla.add}
# What happens to a product; "swiglu" is of two sides, up and gate.
ACTIVATIONS = ("none", "gelu", "gelu_erf", "swiglu")


def static(default: Any = dataclasses.MISSING) -> Any:
    """Return a field that is no array."""
    return dataclasses.field(default=default, metadata={"static": True})


class Picks(NamedTuple):
    """The experts of each token and their gates.

    With `by_pick` what is made for a token is in the order of its picks: S = X slots;
    else by expert: S = E slots, whose gates are the table's, 0 where not picked.
    """

    experts: Int[Array, "B X"]
    gates: Float32[Array, "B X"]
    table: Float32[Array, "B E"]
    by_pick: bool


class Scale(NamedTuple):
    """The scale of an RMS norm and what is added to the mean square."""

    scale: Float[Array, " I"]
    eps: float


class Parts(NamedTuple):
    """Values of a token's heads, in P parts whose shares are 2**sums; P = 1: whole.

    Each slot's I numbers are heads of `width`. Slots that weren't picked may hold
    anything.
    """

    values: Float[Array, "B P S I"]
    sums: Float32[Array, "B P N"] | None = None
    width: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projection:
    """Weights that read the model's width, and what is done with their products.

    weight [E, side, O, I] and bias [E, side, O]; several layers' have a further axis
    in front. Where weights have eight bits, scales [E, side, O] multiply their sums.
    If `apart`, each side reads numbers of its own, which lie side by side.
    """

    weight: Any
    bias: Any = None
    activation: str = static("none")
    scales: Any = None
    apart: bool = static(False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Addition:
    """Weights whose products are added to the residual; `gated`: times the gates.

    weight [O, E, I] and bias [O]; several layers' have a further axis in front. Where
    weights have eight bits, scales [O, E] multiply their sums.
    """

    weight: Any
    bias: Any = None
    gated: bool = static(False)
    scales: Any = None


def project(
    x: Float[Array, "B I"],
    projection: Projection,
    norm: Scale | None = None,
    picks: Picks | None = None,
    *,
    dtype: Any = None,
    implementation: str | None = None,
) -> Float[Array, "B S O"]:
    """Return act(norm(x) weight + bias) of each row's slots, sums in float32 or wider.

    Where there is an activation, it is multiplied by the gate of its pick.

    Args:
      x: one token a row.
      projection: the weights.
      norm: the RMS norm of x; None: x is taken as it is.
      picks: what each row picked; None: the one expert there is.
      dtype: of the result; None: that of x.
      implementation: backend name; None: the first that can serve.

    Raises:
      ConfigError: unknown activation, widths that differ, a norm of numbers of several
        sides, unknown or unfit backend.
    """
    experts, sides, _, width = projection.weight.shape
    if projection.activation not in ACTIVATIONS:
        raise ConfigError(
            f"activation is {projection.activation!r}; "
            + nearest(projection.activation, ACTIVATIONS)
        )
    if sides != 1 + (projection.activation == "swiglu"):
        raise ConfigError(
            f"weights have {sides} sides for activation {projection.activation!r}; "
            "swiglu has 2, up and gate, all others 1"
        )
    _check_width("x", x.shape[1], width * sides if projection.apart else width)
    if projection.apart and not (norm is None and picks is None):
        raise ConfigError(
            "a projection whose sides read numbers of their own has a norm or picks; "
            "give neither"
        )
    _check_picks(experts, picks)
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    args = (x, projection, norm, picks, dtype)
    return dispatch("token_project", BACKENDS, implementation, *args)


def add(
    parts: Parts,
    addition: Addition,
    residual: Float[Array, "B O"],
    picks: Picks | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "B O"]:
    """Return the residual plus the bias plus the products of all picks, summed.

    Args:
      parts: what each slot gives.
      addition: the weights.
      residual: what is added to.
      picks: what each row picked; None: the one expert there is.
      implementation: backend name; None: the first that can serve.

    Raises:
      ConfigError: widths that differ, unknown or unfit backend.
    """
    _, experts, width = addition.weight.shape
    _check_width("values", parts.values.shape[3], width)
    _check_picks(experts, picks)
    args = (parts, addition, residual, picks)
    return dispatch("token_add", ADD_BACKENDS, implementation, *args)


def _check_width(name: str, found: int, width: int) -> None:
    if found != width:
        raise ConfigError(
            f"{name} are {found} wide and the weights read {width}; they must be equal"
        )


def _check_picks(experts: int, picks: Picks | None) -> None:
    if picks is None and experts != 1:
        raise ConfigError(f"{experts} experts without picks; say which a token uses")
