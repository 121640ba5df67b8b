"""Projected rows to queries, keys and values, rotated, each head's rows together."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, Int

from uoe_jax import checks
from uoe_jax.errors import ConfigError
from uoe_jax.ops.dispatch import dispatch
from uoe_jax.ops.split_heads import triton, xla
from uoe_jax.varying import vary_together

# In order of preference where nothing was measured near a call's shape: the first that
# can serve.
BACKENDS = {"xla": xla.split_heads, "triton": triton.split_heads}


def call_shape(rows: Float[Array, "M O"], kv_heads: int, groups: int) -> dict[str, Any]:
    """Return what a call's fastest backend depends on."""
    return {
        "rows": rows.shape[0],
        "kv_heads": kv_heads,
        "groups": groups,
        "width": rows.shape[1] // (kv_heads * (groups + 2)),
        "dtype": rows.dtype.name,
    }


def _settle(given: checks.Given) -> None:
    checks.floats(given, "rows", "M O")
    checks.ints(given, "positions", "N")
    checks.ints(given, "token_ids", "M")
    ids, rows = given["token_ids"].shape[0], given["rows"].shape[0]
    if ids != rows:
        raise ConfigError(f"{ids} token ids for {rows} rows; each needs one")
    checks.within(given, "token_ids", given["positions"].shape[0], "positions")
    checks.whole(given, "kv_heads")
    checks.whole(given, "groups")
    checks.number(given, "theta", positive=True)
    checks.backend(given)


@checks.checked(_settle)
def split_heads(
    rows: Float[Array, "M O"],
    positions: Int[Array, " N"],
    token_ids: Int[Array, " M"],
    *,
    kv_heads: int,
    groups: int,
    theta: float | None,
    implementation: str | None = None,
) -> tuple[
    Float[Array, "J M G H"],
    Float[Array, "J M H"],
    Float[Array, "J M H"],
]:
    """Return queries, keys and values of packed rows, each key/value head's in a run.

    A row has J*G queries, J keys, J values of width H side by side: O = J(G + 2)H.
    Queries and keys are rotated to their token's position (RoFormer, Su et al. 2021,
    eq. 34). The heads come first, as attention within each wants them.

    Args:
      rows: projections of the tokens `token_ids`.
      positions: of all N tokens.
      token_ids: of each row.
      kv_heads: J.
      groups: G, the queries of a key/value head.
      theta: base of the angles; None: nothing is rotated.
      implementation: backend name; None: the fastest that can serve.

    Raises:
      ConfigError: rows that aren't of J(G + 2) heads, an odd width to rotate, another
        number of ids, unknown or unfit backend.
    """
    if kv_heads < 1 or groups < 1:
        raise ConfigError(
            f"kv_heads is {kv_heads} and groups {groups}; both must be at least 1"
        )
    step = kv_heads * (groups + 2) * (1 if theta is None else 2)
    if rows.shape[1] % step:
        raise ConfigError(
            f"rows are {rows.shape[1]} wide; {kv_heads} key/value heads of {groups} "
            f"queries need a multiple of {step}"
        )
    rows, positions, token_ids = vary_together(rows, positions, token_ids)
    return dispatch(
        "split_heads",
        BACKENDS,
        implementation,
        rows,
        positions,
        token_ids,
        kv_heads=kv_heads,
        groups=groups,
        theta=theta,
        shape=call_shape(rows, kv_heads, groups),
    )
