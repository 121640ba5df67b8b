"""Which experts single tokens pick, and how much each counts: all of it in one pass.

On NVIDIA GPUs norm, scores, picks and gates are one kernel. A program routes a row: its
scores are read by nobody else, and the order of so few is found by comparing all pairs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from uoe_jax.errors import ConfigError, nearest
from uoe_jax.ops import nvidia
from uoe_jax.ops.dispatch import dispatch
from uoe_jax.ops.numerics import accumulator_dtype
from uoe_jax.ops.split_matmul import split_matmul
from uoe_jax.ops.token_products.api import Scale, static
from uoe_jax.ops.token_products.xla import rms_norm

MOST_EXPERTS = 128  # whose pairs a program compares
WIDEST = 16384
AREA = 8192  # weights taken at a time
WARPS = 4
# Gates of the picked experts' scores s: 1; 2 sigmoid(s); sigmoid(s) over their sum;
# softmax over the picked, that times their number, or softmax over all.
RULES = ("one", "sigmoid", "affinity", "softmax", "scaled_softmax", "softmax_all")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterWeights:
    """Of E routed experts `top_k` are picked; `shared` others are always on.

    weight [D, E], float32, and bias [E], which is added to a score where experts are
    picked, or to its sigmoid. Those always on come before the others.
    """

    weight: Any
    bias: Any
    top_k: int = static()
    shared: int = static(0)
    rule: str = static("one")
    sigmoid_bias: bool = static(False)


class TokenRouting(NamedTuple):
    """Normalised tokens, their experts with gates, and the gates of all experts."""

    x: Float[Array, "B D"]
    experts: Int[Array, "B X"]
    gates: Float32[Array, "B X"]
    table: Float32[Array, "B E2"]


def route(
    x: Float[Array, "B D"],
    norm: Scale,
    router: RouterWeights,
    *,
    implementation: str | None = None,
) -> TokenRouting:
    """Return norm(x) and what it picks by float32 scores, the highest first.

    Of equal scores the lower expert's goes first. Always-on experts come before the
    picked ones, with gates of 1.

    Raises:
      ConfigError: unknown rule, more picks than experts, unknown or unfit backend.
    """
    if router.rule not in RULES:
        raise ConfigError(f"rule is {router.rule!r}; {nearest(router.rule, RULES)}")
    if not 1 <= router.top_k <= router.weight.shape[1]:
        raise ConfigError(
            f"top_k is {router.top_k} of {router.weight.shape[1]} experts; pick at "
            "least one and at most all"
        )
    args = (x, norm, router)
    return TokenRouting(*dispatch("token_router", BACKENDS, implementation, *args))


def _plain(x: Float[Array, "B D"], norm: Any, router: Any) -> tuple[Array, ...]:
    """Return the fields of a `TokenRouting` by plain JAX."""
    x = rms_norm(x, norm.scale, norm.eps)
    if (x.dtype, router.weight.dtype) == (jnp.bfloat16, jnp.float32):
        scores = split_matmul(x, router.weight)
    else:
        wide = x.astype(accumulator_dtype(x.dtype))
        scores = jnp.dot(wide, router.weight, precision=jax.lax.Precision.HIGHEST)
    key = jax.nn.sigmoid(scores) if router.sigmoid_bias else scores
    picks = jax.lax.top_k(key + router.bias[None], router.top_k)[1]
    chosen = jnp.take_along_axis(scores, picks, axis=1)
    gates = _gates(scores, chosen, picks, router.rule)
    batch, experts = scores.shape
    shared = jnp.arange(router.shared, dtype=picks.dtype)
    always = jnp.broadcast_to(shared[None], (batch, router.shared))
    ones = jnp.ones(always.shape, gates.dtype)
    picks = jnp.concatenate([always, picks + router.shared], axis=1)
    gates = jnp.concatenate([ones, gates], axis=1)
    return x, picks, gates, gate_table(picks, gates, router.shared + experts)


def gate_table(picks: Array, gates: Array, experts: int) -> Array:
    """Return the gates of all experts, 0 of those that weren't picked."""
    one_hot = jax.nn.one_hot(picks, experts, dtype=gates.dtype)
    return jnp.sum(one_hot * gates[..., None], axis=1)


def _gates(scores: Array, chosen: Array, picks: Array, rule: str) -> Array:
    count = picks.shape[1]
    if rule == "one":
        return jnp.ones(chosen.shape, chosen.dtype)
    if rule == "sigmoid":
        return 2.0 * jax.nn.sigmoid(chosen)
    if rule == "affinity":
        affinity = jax.nn.sigmoid(chosen)
        return affinity / (jnp.sum(affinity, axis=-1, keepdims=True) + 1e-20)
    if rule == "softmax_all":
        return jnp.take_along_axis(jax.nn.softmax(scores, axis=-1), picks, axis=1)
    share = jax.nn.softmax(chosen, axis=-1)
    return share * count if rule == "scaled_softmax" else share


def _on_triton(x: Float[Array, "B D"], norm: Any, router: Any) -> tuple[Array, ...]:
    """Return the fields of a `TokenRouting` by a kernel of NVIDIA GPUs.

    Raises:
      NotImplementedError: no fit device, package or dtype; too many experts or inputs.
    """
    nvidia.require(x.dtype)
    width, experts = router.weight.shape
    if experts > MOST_EXPERTS:
        raise NotImplementedError(f"{experts} experts; it takes {MOST_EXPERTS}")
    if width > WIDEST:
        raise NotImplementedError(f"inputs are {width} wide; it takes {WIDEST}")
    return tuple(_launch(x, norm, router))


def _launch(x, norm, router):
    from uoe_jax.ops import token_router_kernels

    batch, width = x.shape
    experts, shared = router.weight.shape[1], router.shared
    block = max(16, 1 << (experts - 1).bit_length())
    whole = max(16, 1 << (width - 1).bit_length())
    chosen = shared + router.top_k
    return nvidia.launch(
        token_router_kernels.route,
        x,
        norm.scale,
        router.weight,
        router.bias,
        out_shape=[
            (x.shape, x.dtype),
            ((batch, chosen), jnp.int32),
            ((batch, chosen), jnp.float32),
            ((batch, shared + experts), jnp.float32),
        ],
        grid=batch,
        num_warps=WARPS,
        num_stages=1,
        small=True,
        D=width,
        DD=whole,
        BD=min(whole, max(16, AREA // block)),
        E=experts,
        EE=max(block, 1 << max(shared - 1, 0).bit_length()),
        S=shared,
        K=router.top_k,
        RULE=router.rule,
        AFFINE=router.sigmoid_bias,
        EPS=norm.eps,
    )


BACKENDS = {"triton": _on_triton, "xla": _plain}
