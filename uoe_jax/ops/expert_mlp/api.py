"""The MLPs of routed experts as one operation: gather, up, gelu, factor, down, sum."""

from __future__ import annotations

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from uoe_jax import checks
from uoe_jax.errors import ConfigError
from uoe_jax.ops.dispatch import dispatch
from uoe_jax.ops.expert_mlp.nvidia import triton
from uoe_jax.ops.grouped_matmul.api import gather_project, project_scatter
from uoe_jax.ops.numerics import PROJECTION, accumulator_dtype, scale_rows
from uoe_jax.ops.packing import Packing


def call_shape(w_up: Float[Array, "E D F"], packing: Packing) -> dict[str, Any]:
    """Return what a call's fastest backend depends on."""
    experts, width, hidden = w_up.shape
    return {
        "rows": packing.token_ids.shape[0],
        "width": width,
        "hidden": hidden,
        "groups": experts,
        "dtype": w_up.dtype.name,
    }


def _settle(given: checks.Given) -> None:
    checks.floats(given, "x", "N D")
    checks.floats(given, "w_up", "E D F")
    checks.floats(given, "w_down", "E F D")
    checks.floats(given, "factors", "M")
    checks.backend(given)
    x, w_up, w_down, packing = (
        given[name] for name in ("x", "w_up", "w_down", "packing")
    )
    if not isinstance(packing, Packing):
        raise ConfigError(
            f"packing is a {type(packing).__name__}; pass what pack_choices returns"
        )
    experts, width, hidden = w_up.shape
    for name, shape, want in (
        ("x", x.shape, (packing.row_ids.shape[0], width)),
        ("w_down", w_down.shape, (experts, hidden, width)),
        ("factors", given["factors"].shape, packing.token_ids.shape),
        ("group_offsets", packing.group_offsets.shape, (experts + 1,)),
    ):
        if shape != want:
            raise ConfigError(
                f"{name} is {list(shape)} beside w_up {list(w_up.shape)} [E, D, F] and "
                f"a packing of {packing.row_ids.shape[0]} tokens in "
                f"{packing.token_ids.shape[0]} rows; it must be {list(want)}"
            )
    if not x.dtype == w_up.dtype == w_down.dtype:
        raise ConfigError(
            f"x is {x.dtype}, w_up {w_up.dtype} and w_down {w_down.dtype}; cast them "
            "to one dtype"
        )


@checks.checked(_settle)
def expert_mlp(
    x: Float[Array, "N D"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
    factors: Float[Array, " M"],
    packing: Packing,
    *,
    implementation: str | None = None,
) -> Float[Array, "N D"]:
    """Return each token's sum of factor * (gelu(x w_up) w_down) over its rows.

    Gelu is the tanh form (Hendrycks and Gimpel 2016, section 2).

    Args:
      x: the tokens.
      w_up: the experts' first weights.
      w_down: their second ones.
      factors: one number of each packed row, such as the gate of its expert.
      packing: which rows each expert and each token has.
      implementation: backend name; None: the fastest that can serve.

    Raises:
      ConfigError: shapes or dtypes that don't fit, unknown or unfit backend.
    """
    factors = factors.astype(accumulator_dtype(x.dtype))
    arrays = x, w_up, w_down, factors, packing
    shape = call_shape(w_up, packing)
    return dispatch("expert_mlp", BACKENDS, implementation, *arrays, shape=shape)


def in_steps(
    x: Float[Array, "N D"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
    factors: Float[Array, " M"],
    packing: Packing,
) -> Float[Array, "N D"]:
    """Return it by the grouped products of the device, and JAX between them."""
    ups = checkpoint_name(gather_project(x, w_up, packing), PROJECTION)
    hidden = scale_rows(jax.nn.gelu(ups, approximate=True), factors[:, None])
    return project_scatter(hidden, w_down, packing)


# In order of preference where nothing was measured near a call's shape: the first that
# can serve.
BACKENDS = {"steps": in_steps, "triton": triton.expert_mlp}
