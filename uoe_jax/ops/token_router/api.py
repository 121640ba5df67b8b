"""Which experts single tokens pick, and how much each counts: all of it in one pass."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Float32, Int

from uoe_jax.errors import ConfigError, nearest
from uoe_jax.ops.dispatch import dispatch
from uoe_jax.ops.token_products.api import Scale, static
from uoe_jax.ops.token_router import triton, xla

BACKENDS = {"triton": triton.route, "xla": xla.route}
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
