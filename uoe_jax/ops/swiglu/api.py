"""SwiGLU of rows that hold both sides, times a factor of each row."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from uoe_jax import checks
from uoe_jax.errors import ConfigError
from uoe_jax.ops.dispatch import dispatch
from uoe_jax.ops.numerics import accumulator_dtype
from uoe_jax.ops.swiglu import triton, xla
from uoe_jax.varying import vary_together

# In order of preference where nothing was measured near a call's shape: the first that
# can serve.
BACKENDS = {"xla": xla.swiglu, "triton": triton.swiglu}


def call_shape(rows: Float[Array, "M O"]) -> dict[str, Any]:
    """Return what a call's fastest backend depends on."""
    return {
        "rows": rows.shape[0],
        "width": rows.shape[1] // 2,
        "dtype": rows.dtype.name,
    }


def _settle(given: checks.Given) -> None:
    checks.floats(given, "rows", "M O")
    checks.floats(given, "factors", "M")
    checks.backend(given)


@checks.checked(_settle)
def swiglu(
    rows: Float[Array, "M O"],
    factors: Float[Array, " R"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M F"]:
    """Return silu(gate) * up * factor of rows, each F of up, then F of gate: O = 2F.

    SwiGLU of Shazeer 2020, equation 6, between its products. It is computed in float32
    or wider and rounded once, and so is its gradient, which is made from rows and
    factors alone: no activations are kept.

    Args:
      rows: both projections of each row.
      factors: one number of each row, such as the gate of its expert.
      implementation: backend name; None: the fastest that can serve.

    Raises:
      ConfigError: an odd width, another number of factors, unknown or unfit backend.
    """
    if rows.shape[1] % 2:
        raise ConfigError(
            f"rows are {rows.shape[1]} wide; up and gate side by side need an even "
            "width"
        )
    if factors.shape != rows.shape[:1]:
        raise ConfigError(
            f"{factors.shape[0]} factors for {rows.shape[0]} rows; each row needs one"
        )
    factors = factors.astype(accumulator_dtype(rows.dtype))
    rows, factors = vary_together(rows, factors)
    shape = call_shape(rows)
    return dispatch("swiglu", BACKENDS, implementation, rows, factors, shape=shape)
