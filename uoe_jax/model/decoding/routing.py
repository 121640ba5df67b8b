"""What a token of each row picks, in the form that products of single tokens take."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uoe_jax.model.baselines.moe import MoeRouter
from uoe_jax.model.cache import Slot, route_token
from uoe_jax.model.layers import Norm
from uoe_jax.model.routing.token import PatchRouter
from uoe_jax.ops.token_products.api import Picks, Scale, static
from uoe_jax.ops.token_router import RouterWeights, gate_table, route

# Rows whose products with all experts are still as fast as the weights are read.
MOST_ROWS = 64
# Experts for each one picked, at most, where all of them are multiplied.
MOST_WASTE = 8

_RULES = {"softmax": "scaled_softmax", "sigmoid": "sigmoid", "straight_through": "one"}
_MOE_RULES = {"softmax": "softmax", "sigmoid": "affinity", "softmax_all": "softmax_all"}


def by_pick(batch: int, experts: int, picks: int) -> bool:
    """Whether fewer weights are read pick by pick than of all experts."""
    return batch * picks <= experts


def serves(batch: int, experts: int, picks: int) -> bool:
    """Whether products without packing serve so many rows."""
    few = batch <= MOST_ROWS and experts <= MOST_WASTE * picks
    return by_pick(batch, experts, picks) or few


def scale_of(norm: Norm | None) -> Scale | None:
    """Return a norm as products take it; None: they can't, or there is none."""
    if norm is None or norm.bias is not None:
        return None
    return Scale(norm.scale[...], norm.eps)


def router_weights(router: Any) -> RouterWeights | None:
    """Return a router that one pass can stand for, or None: it has its own way."""
    rules = {PatchRouter: _RULES, MoeRouter: _MOE_RULES}.get(type(router))
    if rules is None or router.patch_size != 1 or router.gate not in rules:
        return None
    return RouterWeights(
        weight=router.weight[...],
        bias=router.bias[...],
        top_k=router.top_k,
        shared=router.num_shared,
        rule=rules[router.gate],
        sigmoid_bias=rules is _MOE_RULES and router.gate == "sigmoid",
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenRouter:
    """A router, and the same in one pass where there is such a form."""

    router: Any
    weights: RouterWeights | None
    part: str = static()

    @classmethod
    def of(cls, router: Any, part: str) -> TokenRouter:
        """Return the router of a part as decoding uses it."""
        return cls(router, router_weights(router), part)

    def __call__(
        self, x: Float[Array, "B D"], norm: Norm | None, slot: Slot
    ) -> tuple[Float[Array, "B D"], Picks, Slot]:
        """Return norm(x), what each row picks, and the slot that remembers it."""
        experts = self.router.num_experts
        scale = scale_of(norm)
        if self.weights is not None and scale is not None:
            found = route(x, scale, self.weights)
            chosen = found.experts.shape[1]
            form = by_pick(x.shape[0], experts, chosen)
            return found.x, Picks(found.experts, found.gates, found.table, form), slot
        x = x if norm is None else norm(x)
        routing, slot = route_token(self.router, x, slot, self.part)
        choices, gates = routing.choices[:, 0], routing.gates[:, 0]
        choices = choices.astype(jnp.int32)
        form = by_pick(x.shape[0], experts, choices.shape[1])
        table = gate_table(choices, gates, experts)
        return x, Picks(choices, gates, table, form), slot


def enter(
    router: TokenRouter | None, x: Float[Array, "B D"], norm: Norm | None, slot: Slot
) -> tuple[Float[Array, "B D"], Scale | None, Picks | None, Slot]:
    """Return what a part reads, a norm left to its products, what each row picks, and
    the slot that remembers it."""
    if router is not None:
        inner, picks, slot = router(x, norm, slot)
        return inner, None, picks, slot
    scale = scale_of(norm)
    inner = x if scale is not None or norm is None else norm(x)
    return inner, scale, None, slot
