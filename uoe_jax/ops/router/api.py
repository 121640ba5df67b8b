"""Which experts tokens pick, by what scores, and the sums that routers tell of.

In plain JAX, and on NVIDIA GPUs by one kernel forward and two backward: tokens are read
once each way, and their gradient is written once.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax import checks
from uoe_jax.errors import ConfigError
from uoe_jax.ops import measured
from uoe_jax.ops.dispatch import dispatch
from uoe_jax.ops.router import triton, xla
from uoe_jax.varying import vary_together


class Picked(NamedTuple):
    """Experts of each token, the highest score first, and sums over counted tokens."""

    picks: Int[Array, "N X"]
    scores: Float[Array, "N X"]  # of the picks
    counts: Float[Array, " E"]  # of picks
    probs: Float[Array, " E"]  # softmax of a token's scores
    z: Float[Array, ""]  # squared log-partition of a token's scores
    entropy: Float[Array, ""]  # of a token's softmax, nats


def call_shape(x: Float[Array, "*N D"], weight: Float[Array, "D E"]) -> dict[str, Any]:
    """Return what a call's fastest backend depends on."""
    return {
        "rows": math.prod(x.shape[:-1]),
        "width": x.shape[-1],
        "experts": weight.shape[1],
        "dtype": x.dtype.name,
    }


def _settle(given: checks.Given) -> None:
    checks.floats(given, "x", "N D")
    checks.floats(given, "weight", "D E")
    checks.floats(given, "bias", "E")
    checks.whole(given, "top_k")
    checks.backend(given)


@checks.checked(_settle)
def pick_experts(
    x: Float[Array, "N D"],
    weight: Float[Array, "I E"],
    bias: Float[Array, " R"],
    top_k: int,
    counted: Array | None = None,
    *,
    implementation: str | None = None,
) -> Picked:
    """Return the `top_k` experts of each token by score and bias, and sums.

    Scores are x @ weight in float32 or wider. Of equal ones the lower expert's goes
    first. The bias has no gradient.

    Args:
      x: tokens.
      weight: of the router, one column an expert.
      bias: added to scores where experts are picked, and nowhere else.
      top_k: experts of a token.
      counted [N]: which tokens the sums are over; None: all.
      implementation: backend name; None: the fastest that can serve.

    Raises:
      ConfigError: shapes that don't fit, unknown or unfit backend.
    """
    tokens, width = x.shape
    if weight.shape[0] != width:
        raise ConfigError(
            f"weight has {weight.shape[0]} rows for tokens {width} wide; they must be "
            "as many"
        )
    experts = weight.shape[1]
    if bias.shape[0] != experts:
        raise ConfigError(
            f"{bias.shape[0]} biases for {experts} experts; each needs one"
        )
    if not 1 <= top_k <= experts:
        raise ConfigError(
            f"top_k is {top_k} of {experts} experts; pick at least one and at most all"
        )
    if counted is not None and counted.shape != (tokens,):
        raise ConfigError(
            f"counted is {list(counted.shape)} for {tokens} tokens; each needs one"
        )
    shape = call_shape(x, weight)
    if counted is None:
        x, weight, bias = vary_together(x, weight, bias)
    else:
        counted = counted.astype(jnp.float32)
        x, weight, bias, counted = vary_together(x, weight, bias, counted)
    args = (x, weight, bias, counted)
    found = dispatch(
        "router", BACKENDS, implementation, *args, top_k=top_k, shape=shape
    )
    return Picked(*found)


def kernel_pays(x: Float[Array, "*N D"], weight: Float[Array, "D E"]) -> bool:
    """Whether such calls run in kernels here, which measured faster."""
    if measured.prefer("router", tuple(BACKENDS), call_shape(x, weight))[0] == "xla":
        return False
    try:
        triton.require(x, weight)
    except NotImplementedError:
        return False
    return True


# In order of preference where nothing was measured near a call's shape: the first that
# can serve.
BACKENDS = {"xla": xla.pick_experts, "triton": triton.pick_experts}
