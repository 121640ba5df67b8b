"""MLPs of one token a row, on weights laid out for it."""

from __future__ import annotations

import dataclasses
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
    """A dense MLP, or with a router experts of one."""

    inputs: Projection
    outputs: Addition
    router: TokenRouter | None = None

    @classmethod
    def of(cls, layer: Any, dtype: Any) -> TokenMlp:
        """Return an MLP's weights as decoding reads them."""
        router = getattr(layer, "router", None)
        rows = lambda w: jnp.swapaxes(w[...], 1, 2)
        sides = [w for w in (layer.w_up, layer.w_gate) if w is not None]
        biases = [b[...] for b in (layer.b_up, layer.b_gate) if b is not None]
        activation = "gelu_erf" if layer.exact else "gelu"
        down = layer.b_down
        return cls(
            inputs=Projection(
                jnp.stack([rows(w) for w in sides], axis=1).astype(dtype),
                jnp.stack(biases, axis=1).astype(dtype) if biases else None,
                activation if layer.w_gate is None else "swiglu",
            ),
            outputs=Addition(
                jnp.transpose(layer.w_down[...], (2, 0, 1)).astype(dtype),
                None if down is None else down[...].astype(dtype),
            ),
            router=None if router is None else TokenRouter.of(router, "mlp"),
        )

    def add_to(
        self, x: Float[Array, "B D"], norm: Norm | None, slot: Slot
    ) -> tuple[Float[Array, "B D"], Slot]:
        """Return x plus the MLP of norm(x), and its slot."""
        inner, scale, picks, slot = enter(self.router, x, norm, slot)
        hidden = project(inner, self.inputs, scale, picks)
        return add(Parts(hidden[:, None]), self.outputs, x, picks), slot
