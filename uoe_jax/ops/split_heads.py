"""Projected rows to queries, keys and values, rotated, each head's rows together.

In plain JAX, and on NVIDIA GPUs in one pass over the rows each way: XLA makes a copy of
each part, with sines of every row, while rows there are read once and written once, and
a token's sines are made once for all its rows.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from uoe_jax import checks
from uoe_jax.errors import ConfigError
from uoe_jax.ops import nvidia
from uoe_jax.ops.dispatch import dispatch
from uoe_jax.ops.rotary import cosines_and_sines, rotate
from uoe_jax.varying import vary_together

ROWS = 32  # of a program


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


def _plain(
    rows: Float[Array, "M O"],
    positions: Int[Array, " N"],
    token_ids: Int[Array, " M"],
    *,
    kv_heads: int,
    groups: int,
    theta: float | None,
) -> tuple[Array, Array, Array]:
    """Return queries [J, M, G, H], keys and values [J, M, H] by plain JAX."""
    queries, keys = kv_heads * groups, kv_heads
    width = rows.shape[1] // (queries + 2 * keys)
    edges = [queries * width, (queries + keys) * width]
    q, k, v = (
        part.reshape(rows.shape[0], -1, width)
        for part in jnp.split(rows, edges, axis=-1)
    )
    if theta is not None:
        places = positions[token_ids]
        q, k = rotate(q, places, theta), rotate(k, places, theta)
    q = q.reshape(-1, kv_heads, groups, width)
    return jnp.moveaxis(q, 1, 0), jnp.moveaxis(k, 1, 0), jnp.moveaxis(v, 1, 0)


def _on_triton(
    rows: Float[Array, "M O"],
    positions: Int[Array, " N"],
    token_ids: Int[Array, " M"],
    *,
    kv_heads: int,
    groups: int,
    theta: float | None,
) -> tuple[Array, Array, Array]:
    """Return them by kernels of NVIDIA GPUs.

    Raises:
      NotImplementedError: no fit device, package or dtype, no rotation, an empty axis,
        or a head width that isn't a power of two from 16 on.
    """
    nvidia.require(rows.dtype)
    if theta is None:
        raise NotImplementedError("it only splits what it rotates")
    if 0 in (*rows.shape, *positions.shape):
        raise NotImplementedError("it takes no empty arrays")
    width = rows.shape[1] // (kv_heads * (groups + 2))
    if width < 16 or width & (width - 1):
        raise NotImplementedError(
            f"it takes head widths that are powers of two from 16 on, not {width}"
        )
    ids = token_ids.astype(jnp.int32)
    return _split(rows, positions, ids, kv_heads, groups, theta)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _split(rows, positions, token_ids, kv_heads, groups, theta):
    table = _table(positions, rows.shape[1] // (kv_heads * (groups + 2)), theta)
    return split(rows, table, token_ids, kv_heads, groups)


def _split_fwd(rows, positions, token_ids, kv_heads, groups, theta):
    parts = _split(rows, positions, token_ids, kv_heads, groups, theta)
    return parts, (positions, token_ids)


def _split_bwd(kv_heads, groups, theta, saved, grads):
    positions, token_ids = saved
    table = _table(positions, grads[1].shape[-1], theta)
    return join(*grads, table, token_ids), None, None


_split.defvjp(_split_fwd, _split_bwd)


def _table(positions, width, theta):
    """Return each token's cosines, then its sines."""
    return jnp.concatenate(cosines_and_sines(positions, width, theta), axis=-1)


@functools.partial(jax.jit, static_argnums=(3, 4))
def split(
    rows: Float[Array, "M O"],
    table: Float32[Array, "N H"],
    token_ids: Int[Array, " M"],
    kv_heads: int,
    groups: int,
) -> tuple[Array, Array, Array]:
    """Return the rotated heads of rows."""
    from uoe_jax.ops import split_heads_kernels

    count, width = rows.shape[0], table.shape[1]
    keys = (kv_heads, count, width)
    queries = (kv_heads, count, groups, width)
    return tuple(
        nvidia.launch(
            split_heads_kernels.split_heads,
            rows,
            table,
            token_ids,
            out_shape=[(side, rows.dtype) for side in (queries, keys, keys)],
            **_constants(count, kv_heads, groups, width),
        )
    )


@jax.jit
def join(
    q: Float[Array, "J M G H"],
    k: Float[Array, "J M H"],
    v: Float[Array, "J M H"],
    table: Float32[Array, "N H"],
    token_ids: Int[Array, " M"],
) -> Float[Array, "M O"]:
    """Return the rows of heads, rotated back."""
    from uoe_jax.ops import split_heads_kernels

    kv_heads, count, groups, width = q.shape
    return nvidia.launch(
        split_heads_kernels.join_heads,
        q,
        k,
        v,
        table,
        token_ids,
        out_shape=((count, kv_heads * (groups + 2) * width), q.dtype),
        **_constants(count, kv_heads, groups, width),
    )


def _constants(count, kv_heads, groups, width):
    return {
        "grid": -(-count // ROWS),
        "num_warps": 4,
        "num_stages": 1,
        "M": count,
        "J": kv_heads,
        "G": groups,
        "H": width,
        "ROWS": ROWS,
    }


# In order of preference where nothing was measured near a call's shape: the first that
# can serve.
BACKENDS = {"xla": _plain, "triton": _on_triton}
