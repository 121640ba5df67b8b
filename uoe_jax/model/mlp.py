"""MLPs: dense, and as a union of slices of its neurons.

Weights: w_up and w_gate [E, D, F/E], w_down [E, F/E, D]; dense is one expert. Of low
rank r (dense only) a weight is a product: w_up_a [1, D, r] times w_up_b [1, r, F].
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from uoe_jax.config import RANKS, ModelConfig
from uoe_jax.model.cache import Slot, route_token
from uoe_jax.model.context import Context
from uoe_jax.model.layers import (
    add_expert_bias,
    init_bias,
    init_weight,
    project,
    residual_scale,
    row_gates,
)
from uoe_jax.model.routing import make_router
from uoe_jax.model.routing.balance import Stats
from uoe_jax.model.routing.token import Router, Routing
from uoe_jax.model.sharded import pack_local, route
from uoe_jax.ops.expert_mlp.api import expert_mlp
from uoe_jax.ops.grouped_matmul.api import gather_project, project_scatter
from uoe_jax.ops.numerics import PROJECTION, scale_rows
from uoe_jax.ops.packing import Packing
from uoe_jax.ops.swiglu import swiglu


def activate(
    up: Float[Array, "*N F"],
    gate: Float[Array, "*N F"] | None,
    exact: bool = False,
) -> Float[Array, "*N F"]:
    """Return gelu(up), or silu(gate) * up (Shazeer 2020) where there is a gate.

    Gelu is the tanh form, or with `exact` the one of the error function.
    """
    if gate is None:
        return jax.nn.gelu(up, approximate=not exact)
    return jax.nn.silu(gate) * up


class DenseMlp(nnx.Module):
    """Every token uses every neuron."""

    w_up: nnx.Param | None  # None: of low rank
    w_gate: nnx.Param | None
    w_down: nnx.Param | None

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, f = config.d_model, config.d_ff
        self.exact = config.activation == "gelu_erf"
        gated, biased = config.gated, config.has_mlp_bias
        self.gated, self.low_rank = gated, tuple(n for n in RANKS if config.rank(n))
        ends = {"w_up": (d, f), "w_gate": (d, f), "w_down": (f, d)}
        for name, (before, after) in ends.items():
            scale = residual_scale(config) if name == "w_down" else 1.0
            if name == "w_gate" and not gated:
                self.w_gate = None
            elif rank := config.rank(name):
                make = partial(init_weight, rngs, config=config)
                setattr(self, name, None)
                setattr(self, f"{name}_a", make((1, before, rank), before))
                setattr(self, f"{name}_b", make((1, rank, after), rank, scale=scale))
            else:
                shape = (1, before, after)
                setattr(self, name, init_weight(rngs, shape, before, config, scale))
        self.b_up = init_bias((1, f), config, biased)
        self.b_gate = init_bias((1, f), config, gated and biased)
        self.b_down = init_bias((d,), config, biased)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "B T D"], Stats]:
        """Return the output and no statistics."""
        return self.apply(x), {}

    def decode(
        self, x: Float[Array, "B D"], slot: Slot
    ) -> tuple[Float[Array, "B D"], Slot]:
        """Return the output for one token a row; nothing is remembered."""
        return self.apply(x), slot

    def apply(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Return the output for tokens of any leading shape."""
        return self.write(self.neurons(x))

    def neurons(self, x: Float[Array, "*N D"]) -> Float[Array, "*N F"]:
        """Return the activations that the second product reads."""
        bias = None if self.b_up is None else self.b_up[0]
        up = self.product("w_up", x, bias)
        gate = None
        if self.gated:
            bias = None if self.b_gate is None else self.b_gate[0]
            gate = self.product("w_gate", x, bias)
        return activate(up, gate, self.exact)

    def write(self, neurons: Float[Array, "*N F"]) -> Float[Array, "*N D"]:
        """Return what activations add to the residual."""
        bias = None if self.b_down is None else self.b_down[...]
        return self.product("w_down", neurons, bias)

    def product(
        self, name: str, x: Float[Array, "*N I"], bias: Float[Array, " O"] | None
    ) -> Float[Array, "*N O"]:
        """Return x times a weight, or its two of low rank one after the other."""
        if name not in self.low_rank:
            return project(x, getattr(self, name)[0], bias)
        inner = project(x, getattr(self, f"{name}_a")[0])
        return project(inner, getattr(self, f"{name}_b")[0], bias)


class RoutedMlp(nnx.Module):
    """Experts of `width` neurons, each applied to the tokens that chose it."""

    router: Router

    def __init__(
        self,
        config: ModelConfig,
        num_experts: int,
        width: int,
        fan_in: int,
        *,
        rngs: nnx.Rngs,
    ):
        e, d, f = num_experts, config.d_model, width
        self.exact = config.activation == "gelu_erf"
        self.w_up = init_weight(rngs, (e, d, f), d, config)
        gated, biased = config.gated, config.has_mlp_bias
        self.w_gate = init_weight(rngs, (e, d, f), d, config) if gated else None
        scale = residual_scale(config)
        self.w_down = init_weight(rngs, (e, f, d), fan_in, config, scale)
        self.b_up = init_bias((e, f), config, biased)
        self.b_gate = init_bias((e, f), config, gated and biased)
        self.b_down = init_bias((d,), config, biased)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "B T D"], Stats]:
        """Return the output and the routing statistics."""
        routing = route(self.router, x, context)
        return self.apply(x, routing, context), routing.stats

    def decode(
        self, x: Float[Array, "B D"], slot: Slot
    ) -> tuple[Float[Array, "B D"], Slot]:
        """Return the output for one token a row, and what its router remembers."""
        routing, slot = route_token(self.router, x, slot, "mlp")
        return self.apply(x[:, None], routing)[:, 0], slot

    def apply(
        self, x: Float[Array, "B T D"], routing: Routing, context: Context | None = None
    ) -> Float[Array, "B T D"]:
        """Return the sum of each token's chosen experts times their gates.

        The output bias is added once, not by every expert.
        """
        if context is None:
            packing = self.router.pack(routing)
        else:
            packing = pack_local(self.router, routing, context, self.w_up.shape[0])
        y = self.experts(x.reshape(-1, x.shape[-1]), packing, routing.gates)
        if self.b_down is not None:
            y = y + self.b_down[...].astype(y.dtype)[None]
        return checkpoint_name(y, PROJECTION).reshape(x.shape)

    def experts(
        self,
        x: Float[Array, "N D"],
        packing: Packing,
        gates: Float[Array, "B T X"] | None = None,
    ) -> Float[Array, "N D"]:
        """Return each token's sum over the packed rows it has, times their gates."""
        factors = None if gates is None else row_gates(gates, packing)
        plain = self.w_gate is None and self.b_up is None and not self.exact
        if plain and factors is not None:
            w_up, w_down = (w[...].astype(x.dtype) for w in (self.w_up, self.w_down))
            return expert_mlp(x, w_up, w_down, factors, packing)
        hidden = self._hidden(x, packing, factors)
        return project_scatter(hidden, self.w_down[...].astype(x.dtype), packing)

    def _hidden(self, x: Array, packing: Packing, factors: Array | None) -> Array:
        """Return the activations [M, F] of the packed rows times their factors."""
        # Gate and up in one product, so that each token's row is gathered once.
        pair = [w for w in (self.w_up, self.w_gate) if w is not None]
        weight = jnp.concatenate([w[...] for w in pair], axis=-1).astype(x.dtype)
        rows = gather_project(x, weight, packing)
        biases = [b[...] for b in (self.b_up, self.b_gate) if b is not None]
        if biases:
            rows = add_expert_bias(rows, jnp.concatenate(biases, axis=-1), packing)
        rows = checkpoint_name(rows, PROJECTION)
        if self.w_gate is not None and factors is not None:
            return swiglu(rows, factors)
        up, gate = (rows, None) if self.w_gate is None else jnp.split(rows, 2, axis=-1)
        hidden = activate(up, gate, self.exact)
        return hidden if factors is None else scale_rows(hidden, factors[:, None])


class UnionMlp(RoutedMlp):
    """Union of MLP experts (UoME; Yang et al. 2025): slices of one MLP's neurons."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        union, f = config.union, config.d_ff
        experts = union.num_experts
        super().__init__(config, experts, f // experts, f, rngs=rngs)
        self.router = make_router(config.d_model, union, config.causal, rngs=rngs)
