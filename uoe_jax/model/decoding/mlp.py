"""MLPs of one token a row, on weights laid out for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uoe_jax.model.cache import Slot
from uoe_jax.model.decoding.routing import TokenRouter, enter
from uoe_jax.model.layers import Norm
from uoe_jax.ops.token_products.api import (
    Addition,
    Parts,
    Projection,
    add,
    project,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenMlp:
    """A dense MLP, or with a router experts of one.

    A weight of low rank is multiplied out, or two products: `before` reads the ranks of
    all that `inputs` make neurons of, `after` those of neurons that `outputs` read.
    """

    inputs: Projection
    outputs: Addition
    router: TokenRouter | None = None
    before: Projection | None = None
    after: Projection | None = None

    @classmethod
    def of(
        cls, layer: Any, dtype: Any, two: Callable[[int], bool] = lambda spared: False
    ) -> TokenMlp:
        """Return an MLP's weights as decoding reads them.

        `two` says whether two products are faster than one, of how many weights less.
        """
        router = getattr(layer, "router", None)
        low = getattr(layer, "low_rank", ())
        sides = ["w_up"]
        if layer.w_gate is not None or "w_gate" in low:
            sides.append("w_gate")
        biases = [b[...] for b in (layer.b_up, layer.b_gate) if b is not None]
        activation = "gelu_erf" if layer.exact else "gelu"
        before = after = None
        if set(sides) <= {*low} and two(_spared(layer, sides)):
            rank = _rank(layer, sides)
            first, second = zip(*(_pair(layer, n, rank) for n in sides), strict=True)
            first = jnp.concatenate(first, axis=1)
            before = Projection(first[:, None].astype(dtype))
        else:
            second = [_rows(layer, n) for n in sides]
        down, narrow = layer.b_down, ["w_down"]
        if "w_down" in low and two(_spared(layer, narrow)):
            reads, outputs = _pair(layer, "w_down", _rank(layer, narrow))
            after = Projection(reads[:, None].astype(dtype))
        else:
            outputs = _rows(layer, "w_down")
        return cls(
            inputs=Projection(
                jnp.stack(second, axis=1).astype(dtype),
                jnp.stack(biases, axis=1).astype(dtype) if biases else None,
                activation if len(sides) == 1 else "swiglu",
                apart=before is not None,
            ),
            outputs=Addition(
                jnp.swapaxes(outputs, 0, 1).astype(dtype),
                None if down is None else down[...].astype(dtype),
            ),
            router=None if router is None else TokenRouter.of(router, "mlp"),
            before=before,
            after=after,
        )

    def add_to(
        self, x: Float[Array, "B D"], norm: Norm | None, slot: Slot
    ) -> tuple[Float[Array, "B D"], Slot]:
        """Return x plus the MLP of norm(x), and its slot."""
        inner, scale, picks, slot = enter(self.router, x, norm, slot)
        if self.before is not None:
            inner, scale = project(inner, self.before, scale)[:, 0], None
        hidden = project(inner, self.inputs, scale, picks)
        if self.after is not None:
            hidden = project(hidden[:, 0], self.after)
        return add(Parts(hidden[:, None]), self.outputs, x, picks), slot


def _rows(layer: Any, name: str) -> Float[Array, "E O I"]:
    """Return a weight, of low rank multiplied out, a row for each output."""
    if name not in getattr(layer, "low_rank", ()):
        return jnp.swapaxes(getattr(layer, name)[...], 1, 2)
    first, second = (getattr(layer, f"{name}_{half}")[...] for half in "ab")
    wide = jnp.promote_types(first.dtype, jnp.float32)
    return jnp.einsum(
        "eir,ero->eoi",
        first.astype(wide),
        second.astype(wide),
        precision=jax.lax.Precision.HIGHEST,
    )


def _rank(layer: Any, names: list[str]) -> int:
    """Return one rank for weights, with zeros: a multiple of 8, as kernels want it."""
    ranks = [getattr(layer, f"{name}_b").shape[1] for name in names]
    return -(-max(ranks) // 8) * 8


def _spared(layer: Any, names: list[str]) -> int:
    """Return how many weights less two products of each weight read than one."""
    inner = getattr(layer, f"{names[0]}_a").shape[1]
    outer = getattr(layer, f"{names[0]}_b").shape[2]
    rank = _rank(layer, names)
    return len(names) * (inner * outer - rank * (inner + outer))


def _pair(layer: Any, name: str, rank: int) -> tuple[Array, Array]:
    """Return a weight of low rank as rows [1, R, I] and [1, O, R] of two products."""
    first, second = (getattr(layer, f"{name}_{half}")[...] for half in "ab")
    missing = ((0, 0), (0, 0), (0, rank - first.shape[2]))
    first, second = jnp.pad(first, missing), jnp.swapaxes(second, 1, 2)
    return jnp.swapaxes(first, 1, 2), jnp.pad(second, missing)
