"""One matrix product per group of rows, with the gather or sum around it."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, Int

from uoe_jax import checks
from uoe_jax.errors import ConfigError
from uoe_jax.ops.dispatch import dispatch
from uoe_jax.ops.grouped_matmul import reference, xla
from uoe_jax.ops.grouped_matmul.nvidia import triton
from uoe_jax.ops.grouped_matmul.tpu import mosaic as mosaic_tpu
from uoe_jax.ops.packing import Packing

# In order of preference where nothing was measured near a call's shape: the first that
# can serve.
GROUPED_MATMUL = {
    "mosaic_tpu": mosaic_tpu.grouped_matmul,
    "triton": triton.grouped_matmul,
    "xla": xla.grouped_matmul,
    "reference": reference.grouped_matmul,
}
GATHER_PROJECT = {
    "mosaic_tpu": mosaic_tpu.gather_project,
    "triton": triton.gather_project,
    "xla": xla.gather_project,
    "reference": reference.gather_project,
}
PROJECT_SCATTER = {
    "mosaic_tpu": mosaic_tpu.project_scatter,
    "triton": triton.project_scatter,
    "xla": xla.project_scatter,
    "reference": reference.project_scatter,
}


def call_shape(num_rows: int, w: Float[Array, "E I O"]) -> dict[str, Any]:
    """Return what a call's fastest backend depends on."""
    groups, inner, outer = w.shape
    return {
        "rows": num_rows,
        "inner": inner,
        "outer": outer,
        "groups": groups,
        "dtype": w.dtype.name,
    }


def _settle(given: checks.Given) -> None:
    checks.floats(given, "x", "M I")
    checks.floats(given, "w", "E I O")
    checks.ints(given, "offsets", "E+1")
    checks.ascending(given, "offsets", given["x"].shape[0])
    checks.backend(given)


def _settle_packing(given: checks.Given, name: str, form: str) -> int:
    """Check the call of a packed product; return how many rows `name` has."""
    checks.floats(given, name, form)
    checks.floats(given, "w", "E I O")
    checks.backend(given)
    packing = given["packing"]
    if not isinstance(packing, Packing):
        raise ConfigError(
            f"packing is a {type(packing).__name__}; pass what pack_choices returns"
        )
    return given[name].shape[0]


def _settle_tokens(given: checks.Given) -> None:
    tokens = _settle_packing(given, "x", "N I")
    if tokens != given["packing"].row_ids.shape[0]:
        raise ConfigError(
            f"x has {tokens} tokens and the packing {given['packing'].row_ids.shape[0]}"
            "; pack the choices of these tokens"
        )


def _settle_rows(given: checks.Given) -> None:
    rows = _settle_packing(given, "rows", "M I")
    if rows != given["packing"].token_ids.shape[0]:
        raise ConfigError(
            f"there are {rows} rows and the packing has "
            f"{given['packing'].token_ids.shape[0]}; pass the rows of this packing"
        )


@checks.checked(_settle)
def grouped_matmul(
    x: Float[Array, "M I"],
    w: Float[Array, "E I2 O"],
    offsets: Int[Array, " E1"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M O"]:
    """Return each row times its group's weight, summed in float32 or wider.

    Group e is rows `offsets[e]:offsets[e + 1]`; it may be empty. Rows past
    `offsets[-1]` return zeros and get zero gradients.

    Raises:
      ConfigError: shapes or dtypes that don't fit, unknown or unfit backend.
    """
    _check(x, w, offsets)
    shape = call_shape(x.shape[0], w)
    return dispatch(
        "grouped_matmul", GROUPED_MATMUL, implementation, x, w, offsets, shape=shape
    )


@checks.checked(_settle_tokens)
def gather_project(
    x: Float[Array, "N I"],
    w: Float[Array, "E I2 O"],
    packing: Packing,
    *,
    implementation: str | None = None,
) -> Float[Array, "M O"]:
    """Return each row's token times the row's expert weight.

    Raises:
      ConfigError: as `grouped_matmul`.
    """
    _check(x, w, packing.group_offsets)
    shape = call_shape(packing.token_ids.shape[0], w)
    return dispatch(
        "gather_project", GATHER_PROJECT, implementation, x, w, packing, shape=shape
    )


@checks.checked(_settle_rows)
def project_scatter(
    rows: Float[Array, "M I"],
    w: Float[Array, "E I2 O"],
    packing: Packing,
    *,
    implementation: str | None = None,
) -> Float[Array, "N O"]:
    """Return each token's sum of its rows times their expert weights.

    Raises:
      ConfigError: as `grouped_matmul`.
    """
    _check(rows, w, packing.group_offsets)
    shape = call_shape(rows.shape[0], w)
    return dispatch(
        "project_scatter",
        PROJECT_SCATTER,
        implementation,
        rows,
        w,
        packing,
        shape=shape,
    )


def _check(x: Any, w: Any, offsets: Any) -> None:
    if x.shape[1] != w.shape[1]:
        raise ConfigError(
            f"rows are {x.shape[1]} wide beside weights {list(w.shape)} [E, I, O]; "
            f"I must be {x.shape[1]}"
        )
    if offsets.shape[0] != w.shape[0] + 1:
        raise ConfigError(
            f"offsets has {offsets.shape[0]} entries beside {w.shape[0]} weights; "
            f"it needs {w.shape[0] + 1}"
        )
    if x.dtype != w.dtype:
        raise ConfigError(
            f"rows are {x.dtype} and weights {w.dtype}; cast them to one dtype"
        )
