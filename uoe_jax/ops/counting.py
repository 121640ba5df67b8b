"""A packing by counting instead of sorting: what a GPU does ten times as fast.

A pick's row is the number of picks that come before it by (expert, sample, token). With
few experts that number is a running count in a small table, and one scatter of token
ids, each to its own row, is all that moves.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from uoe_jax.varying import vary_together, zeros_varying

BLOCK = 128  # tokens counted by one small product of ones


def count_choices(
    choices: Int[Array, "B T X"],
    num_experts: int,
    kept: Bool[Array, "B T X"] | None = None,
) -> tuple[Int[Array, " M"], Int[Array, "N X"], Int[Array, " S1"]]:
    """Return token ids, row ids and segment offsets, as sorting would give them.

    Picks that don't count follow the last segment, in their own order.
    """
    batch, length, top_k = choices.shape
    hit = jax.nn.one_hot(choices, num_experts, dtype=jnp.bool_)
    if kept is not None:
        hit = hit & kept[..., None]
    member = jnp.any(hit, axis=2)
    so_far = running_count(member)
    ends = jnp.cumsum(so_far[:, -1].T.reshape(-1), dtype=jnp.int32)
    segment_offsets = jnp.concatenate([zeros_varying((1,), jnp.int32, ends), ends])
    first = segment_offsets[:-1].reshape(num_experts, batch).T
    row = first[:, None] + so_far - member
    rows = jnp.sum(jnp.where(hit, row[:, :, None], 0), axis=-1).reshape(-1)
    if kept is not None:
        flat = kept.reshape(-1)
        dropped = jnp.cumsum(~flat, dtype=jnp.int32)
        rows = jnp.where(flat, rows, ends[-1] + dropped - 1)
    token = jnp.arange(rows.size, dtype=jnp.int32) // top_k
    token_ids, rows, token = vary_together(jnp.zeros_like(token), rows, token)
    token_ids = token_ids.at[rows].set(token, unique_indices=True)
    return token_ids, rows.reshape(batch * length, top_k), segment_offsets


def running_count(member: Bool[Array, "B T E"]) -> Int[Array, "B T E"]:
    """Return how many tokens up to and including each are members, by expert.

    Whole blocks of tokens are counted by products with a triangle of ones: exact, as
    counts to 128 fit float32, and faster than a scan over single tokens.
    """
    batch, length, experts = member.shape
    if length % BLOCK:
        return jnp.cumsum(member, axis=1, dtype=jnp.int32)
    parts = member.reshape(batch, length // BLOCK, BLOCK, experts)
    ones = jnp.tril(jnp.ones((BLOCK, BLOCK), jnp.bfloat16))
    inside = jnp.einsum(
        "ij,bnje->bnie",
        ones,
        parts.astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    ).astype(jnp.int32)
    whole = inside[:, :, -1]
    before = jnp.cumsum(whole, axis=1, dtype=jnp.int32) - whole
    return (inside + before[:, :, None]).reshape(batch, length, experts)
