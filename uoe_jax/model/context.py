"""What all blocks of one forward call share."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from uoe_jax.config import ModelConfig
from uoe_jax.errors import ConfigError


class Context(NamedTuple):
    """Positions, documents, patch leaders, randomness and the mesh axis of a call.

    `segments` are document ids, 0 for padding; None means one document a row.
    `leaders` are the tokens whose routing decision each token follows; None when every
    token decides for itself. `key` is None when dropout is off.
    """

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"] | None
    leaders: Int[Array, "B T"] | None
    key: jax.Array | None
    axis_name: str | None
    collect_choices: bool


def make_context(
    config: ModelConfig,
    shape: tuple[int, ...],
    *,
    positions: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    key: jax.Array | None = None,
    train: bool = False,
    axis_name: str | None = None,
    collect_choices: bool = False,
) -> Context:
    """Return the context of `shape` = (B, T) tokens; ConfigError when T is too long."""
    length = shape[1]
    if length > config.max_seq_len:
        raise ConfigError(
            f"{length} tokens are more than max_seq_len {config.max_seq_len}; "
            "shorten the input or raise model.max_seq_len"
        )
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length)[None], shape)
    if not train or config.dropout == 0.0:
        key = None
    if key is not None and axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    patch = config.union.patch_size
    leaders = None if patch == 1 else patch_leaders(shape, segments, patch)
    return Context(positions, segments, leaders, key, axis_name, collect_choices)


def patch_leaders(
    shape: tuple[int, ...], segments: Int[Array, "B T"] | None, patch_size: int
) -> Int[Array, "B T"]:
    """Return each token's patch leader: the first token of its patch.

    Patches are counted from the start of each document, so they never span two.
    """
    index = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
    if segments is None:
        return index - index % patch_size
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = jnp.where(segments != before, index, jnp.zeros_like(index))
    start = jax.lax.cummax(start, axis=1)
    return index - (index - start) % patch_size
