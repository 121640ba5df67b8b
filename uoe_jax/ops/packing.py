"""Rows of a routed layer: which token each row is, and which rows each token has.

Routing is a permutation with repeats, known from both sides, so moving data into rows
and back are two gathers that are each other's transpose: nothing is scatter-added, and
results are the same on every run.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from uoe_jax import checks
from uoe_jax.errors import ConfigError
from uoe_jax.ops.counting import count_choices
from uoe_jax.ops.numerics import accumulator_dtype
from uoe_jax.varying import vary_together

MAX_COUNTED = 256  # experts; the table of running counts is B x T x E numbers


class Packing(NamedTuple):
    """Rows sorted by (expert, sample, token); M = B * T * X of them, N = B * T tokens.

    Segment s = e * B + b holds the rows of sample b that chose expert e. Picks that
    don't count come after the last segment; those past M have row M or higher.
    """

    token_ids: Int[Array, " M"]  # row -> flat token b * T + t
    row_ids: Int[Array, "N X"]  # token -> its rows, in the order of its picks
    segment_offsets: Int[Array, " S1"]  # E * B + 1 first rows
    group_offsets: Int[Array, " E1"]  # E + 1 first rows of the experts

    def together(self, x: Array, w: Array) -> tuple[Array, Array, Packing]:
        """Return rows, weights and packing, varying over the same mesh axes."""
        x, w, *ids = vary_together(x, w, *self)
        return x, w, Packing(*ids)


def _settle(given: checks.Given) -> None:
    checks.ints(given, "choices", "B T X")
    checks.whole(given, "num_experts")
    checks.whole(given, "num_rows", optional=True)
    shape, experts = given["choices"].shape, given["num_experts"]
    kept = given["kept"]
    # Of the choices that aren't kept, as where a device has only some of the experts,
    # nothing is asked.
    least = max(shape[2] if kept is None else 1, 1)
    if experts < least:
        raise ConfigError(
            f"num_experts is {experts}; {shape[2]} distinct choices a token need at "
            f"least {least}"
        )
    if kept is None:
        checks.within(given, "choices", experts, "experts")
        return
    if getattr(kept, "shape", None) != shape or kept.dtype != bool:
        found = f"{getattr(kept, 'dtype', '')} {list(getattr(kept, 'shape', ()))}"
        raise ConfigError(
            f"kept is {type(kept).__name__} {found}; it must be bool {list(shape)}, as "
            "the choices are"
        )
    if all(map(checks.is_concrete, (kept, given["choices"]))):
        counted = {"choices": np.where(kept, given["choices"], 0)}
        checks.within(counted, "choices", experts, "experts")


@checks.checked(_settle)
def pack_choices(
    choices: Int[Array, "B T X"],
    num_experts: int,
    kept: Bool[Array, "B T X"] | None = None,
    num_rows: int | None = None,
) -> Packing:
    """Return the rows of each token's X distinct chosen experts, all below E.

    Only `kept` picks (default all) are in a segment. `num_rows` cuts M down where it is
    known that no more picks are kept.
    """
    batch, length, top_k = choices.shape
    num_tokens = batch * length
    if (num_experts + top_k) * num_tokens >= 2**31:
        raise ConfigError(
            f"{num_experts} experts x {num_tokens} tokens; row keys need fewer than "
            "2**31; make the batch per device smaller"
        )
    few = num_experts <= MAX_COUNTED
    pack = count_choices if few and jax.default_backend() == "gpu" else sort_choices
    token_ids, row_ids, segment_offsets = pack(choices, num_experts, kept)
    return Packing(
        token_ids=token_ids[:num_rows],
        row_ids=row_ids,
        segment_offsets=segment_offsets,
        group_offsets=segment_offsets[::batch],
    )


def sort_choices(
    choices: Int[Array, "B T X"],
    num_experts: int,
    kept: Bool[Array, "B T X"] | None = None,
) -> tuple[Int[Array, " M"], Int[Array, "N X"], Int[Array, " S1"]]:
    """Return token ids, row ids and segment offsets by sorting all picks."""
    batch, length, top_k = choices.shape
    num_tokens, num_rows = batch * length, batch * length * top_k
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    keys = choices.reshape(num_tokens, top_k).astype(jnp.int32) * num_tokens
    keys = (keys + token[:, None]).reshape(num_rows)
    picks = jnp.arange(num_rows, dtype=jnp.int32)
    if kept is not None:
        keys = jnp.where(kept.reshape(num_rows), keys, num_experts * num_tokens + picks)
    keys, order, picks = vary_together(keys, picks, picks)
    keys, order = jax.lax.sort((keys, order), num_keys=1)
    # The inverse permutation: where each pick went.
    _, rows = jax.lax.sort((order, picks), num_keys=1)
    edges = jnp.arange(num_experts * batch + 1, dtype=jnp.int32) * length
    segment_offsets = jnp.searchsorted(keys, edges).astype(jnp.int32)
    token_ids = keys % num_tokens if kept is None else order // top_k
    return token_ids, rows.reshape(num_tokens, top_k), segment_offsets


def gather_rows(x: Float[Array, "N D"], packing: Packing) -> Float[Array, "M D"]:
    """Return each row's token. The gradient is `combine_rows`."""
    return _gather(*vary_together(x, packing.token_ids, packing.row_ids))


def combine_rows(rows: Float[Array, "M D"], packing: Packing) -> Float[Array, "N D"]:
    """Return each token's sum over its rows, added in float32 or wider.

    The gradient is `gather_rows`.
    """
    return _combine(*vary_together(rows, packing.token_ids, packing.row_ids))


def _take(x: jax.Array, ids: jax.Array) -> jax.Array:
    return x.at[ids].get(mode="promise_in_bounds")


def take_rows(rows: Float[Array, "M ..."], row_ids: Int[Array, "*N"]) -> Array:
    """Return rows by id; an id past the last row gives zeros."""
    return rows.at[row_ids].get(mode="fill", fill_value=0)


def _sum_rows(rows: jax.Array, row_ids: jax.Array) -> jax.Array:
    total = take_rows(rows, row_ids[:, 0]).astype(accumulator_dtype(rows.dtype))
    for pick in range(1, row_ids.shape[1]):
        total = total + take_rows(rows, row_ids[:, pick]).astype(total.dtype)
    return total.astype(rows.dtype)


@jax.custom_vjp
def _gather(x, token_ids, row_ids):
    del row_ids
    return _take(x, token_ids)


@jax.custom_vjp
def _combine(rows, token_ids, row_ids):
    del token_ids
    return _sum_rows(rows, row_ids)


def _gather_fwd(x, token_ids, row_ids):
    return _take(x, token_ids), (token_ids, row_ids)


def _gather_bwd(ids, grad):
    return _combine(grad, *ids), None, None


def _combine_fwd(rows, token_ids, row_ids):
    return _sum_rows(rows, row_ids), (token_ids, row_ids)


def _combine_bwd(ids, grad):
    return _gather(grad, *ids), None, None


_gather.defvjp(_gather_fwd, _gather_bwd)
_combine.defvjp(_combine_fwd, _combine_bwd)
