"""What all blocks of one forward call share."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from uoe_jax import checks
from uoe_jax.config import ModelConfig
from uoe_jax.errors import ConfigError, nearest
from uoe_jax.partition.collectives import Parallel

_DRAW = 2**31 - 1  # by which the key of draws differs from those of layers


class Context(NamedTuple):
    """Positions, documents, randomness and the mesh axes of a call.

    `segments` are document ids, 0 for padding; None means one document a row. `key` is
    None when dropout is off. `train` says that capacities hold. `lengths` are given
    when a cache is filled: routers then add what decoding needs to their statistics.
    `parallel` has the collectives of weights and tokens that are spread over devices.
    `scored` are the tokens that routers' statistics are of; None means all but padding.
    `draw` is the key by which training draws how many experts are on: the same on all
    devices.
    """

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"] | None
    key: jax.Array | None
    axis_name: str | tuple[str, ...] | None
    collect_choices: bool
    train: bool = False
    lengths: Int[Array, " B"] | None = None
    parallel: Parallel | None = None
    scored: Bool[Array, "B T"] | None = None
    draw: jax.Array | None = None

    @property
    def counted(self) -> Bool[Array, "B T"] | None:
        """The tokens that routers' statistics are of; None: all."""
        if self.scored is not None or self.segments is None:
            return self.scored
        return self.segments != 0


def _check_call(given: dict[str, Any], name: str, check_input: Any) -> None:
    """Check a model's input and the options beside it."""
    options = given["options"]
    known = [n for n in inspect.signature(make_context).parameters][2:]
    for word in options:
        if word not in known:
            raise ConfigError(
                f"the model has no option {word!r}; {nearest(word, known)}"
            )
    check_input(given)
    for option in ("positions", "segments", "token_types"):
        values = given if option in given else options
        if values.get(option) is None:
            continue
        checks.ints(values, option, "B T")
        if values[option].shape != given[name].shape[:2]:
            raise ConfigError(
                f"{option} is {list(values[option].shape)} beside {name} "
                f"{list(given[name].shape)}; each token needs one"
            )
    if given.get("token_types") is not None:
        count = given["self"].config.token_types
        checks.within(given, "token_types", count, "types of model.token_types")


def _check_tokens(given: dict[str, Any]) -> None:
    checks.ints(given, "tokens", "B T")
    vocabulary = given["self"].config.vocab_size
    checks.within(given, "tokens", vocabulary, "tokens of model.vocab_size")


def _check_images(given: dict[str, Any]) -> None:
    config: ModelConfig = given["self"].config
    checks.floats(given, "images", "B H W C")
    side, channels = config.image_size, config.image_channels
    if given["images"].shape[1:] != (side, side, channels):
        raise ConfigError(
            f"images is {list(given['images'].shape)}; this model takes [B, {side}, "
            f"{side}, {channels}]"
        )


# Decorators of what a model is called with; numbers are looked at only where known.
takes_tokens = checks.checked(
    partial(_check_call, name="tokens", check_input=_check_tokens)
)
takes_images = checks.checked(
    partial(_check_call, name="images", check_input=_check_images)
)


def make_context(
    config: ModelConfig,
    shape: tuple[int, ...],
    *,
    positions: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    key: jax.Array | None = None,
    train: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
    collect_choices: bool = False,
    lengths: Int[Array, " B"] | None = None,
    parallel: Parallel | None = None,
    scored: Bool[Array, "B T"] | None = None,
) -> Context:
    """Return the context of `shape` = (B, T) tokens; ConfigError when T is too long."""
    length = shape[1]
    if length > config.max_seq_len:
        raise ConfigError(
            f"{length} tokens are more than max_seq_len {config.max_seq_len}; "
            "shorten the input or raise model.max_seq_len"
        )
    if positions is None:
        first = 0 if parallel is None else parallel.first_position(length)
        positions = jnp.broadcast_to(first + jnp.arange(length)[None], shape)
    draw = None
    if train and key is not None and config.draws:
        draw = jax.random.fold_in(key, _DRAW)
    if not train or config.dropout == 0.0:
        key = None
    if key is not None and axis_name is not None:
        axes = axis_name
        if parallel is not None and parallel.scatters:
            axes = (*parallel.token_axes, "tensor")
        key = jax.random.fold_in(key, jax.lax.axis_index(axes))
    return Context(
        positions,
        segments,
        key,
        axis_name,
        collect_choices,
        train,
        lengths,
        parallel,
        scored,
        draw,
    )


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


def document_span(
    shape: tuple[int, ...], segments: Int[Array, "B T"] | None, causal: bool
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Return the first and last token that each token may see: its document's, and in a
    causal model none after itself."""
    index = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
    first = patch_leaders(shape, segments, shape[1])
    if causal:
        return first, index
    backwards = None if segments is None else segments[:, ::-1]
    last = shape[1] - 1 - patch_leaders(shape, backwards, shape[1])[:, ::-1]
    return first, last
