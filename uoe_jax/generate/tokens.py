"""Tokens that follow prompts: one compiled prefill and decode loop, or a stream."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from uoe_jax.config import ModelConfig
from uoe_jax.errors import ConfigError
from uoe_jax.generate.drawing import Drawing, make_drawing
from uoe_jax.generate.sampling import Sampling
from uoe_jax.given import one_of
from uoe_jax.model import Cache, Decoder, init_cache
from uoe_jax.model.decoding.step import TokenDecoder, prepare


class State(NamedTuple):
    """The last token of each row, whether it has ended, and what came before."""

    token: Int[Array, " B"]
    done: Bool[Array, " B"]
    cache: Cache


def generate(
    model: Decoder,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    key: jax.Array | None = None,
    eos: int | None = None,
    on_token: Callable[[Int[np.ndarray, " B"]], object] | None = None,
    **options: Any,
) -> Int[Array, "B O"]:
    """Return `max_new_tokens` continuations of the prompts `tokens[b, :lengths[b]]`.

    How they are drawn is said by `sampling`, or by its fields as `options`. A row that
    produced `eos` is filled up with it. `on_token` is called with each row's next token
    as soon as it is there. Raises ConfigError for lengths or sampling that make no
    sense.
    """
    given = _settle(model, tokens, lengths, max_new_tokens)
    sampling = one_of("sampling", Sampling, sampling, options)
    drawing = make_drawing(model.config, sampling, key)
    if on_token is not None:
        found = []
        for token in _steps(model, *given, max_new_tokens, drawing, eos):
            found.append(token)
            on_token(token)
        missing = max_new_tokens - len(found)
        rest = [np.full_like(found[0], 0 if eos is None else eos)] * missing
        return jnp.asarray(np.stack([*found, *rest], axis=1))
    decoder = prepare(model, tokens.shape[0])
    return _generate(
        model,
        decoder,
        *given,
        drawing,
        max_new_tokens=max_new_tokens,
        eos=eos,
    )


def stream(
    model: Decoder,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    key: jax.Array | None = None,
    eos: int | None = None,
    **options: Any,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Return an iterator of each row's next token, those that `generate` returns.

    It ends when every row has ended. Requests that make no sense raise ConfigError
    here, not at the first token.
    """
    given = _settle(model, tokens, lengths, max_new_tokens)
    sampling = one_of("sampling", Sampling, sampling, options)
    drawing = make_drawing(model.config, sampling, key)
    return _steps(model, *given, max_new_tokens, drawing, eos)


def _begin(
    model: Decoder,
    tokens: Array,
    lengths: Array,
    max_new_tokens: int,
    drawing: Drawing,
    eos: int | None,
) -> State:
    """Return the state after the prompts: their first new tokens."""
    batch, length = tokens.shape
    cache = init_cache(model.config, batch, length + max_new_tokens)
    logits, cache = model.prefill(tokens, lengths, cache)
    token = drawing.draw(logits, 0)
    return State(token, _ended(token, eos), cache)


def _extend(
    decoder: TokenDecoder, state: State, step: Any, drawing: Drawing, eos: int | None
) -> State:
    """Return the state after token number `step`."""
    logits, cache = decoder.decode(state.token, state.cache)
    token = drawing.draw(logits, step)
    if eos is not None:
        token = jnp.where(state.done, eos, token)
    return State(token, state.done | _ended(token, eos), cache)


def _ended(token: Array, eos: int | None) -> Array:
    return jnp.zeros(token.shape, bool) if eos is None else token == eos


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "eos"))
def _generate(
    model: Decoder,
    decoder: TokenDecoder,
    tokens: Array,
    lengths: Array,
    drawing: Drawing,
    *,
    max_new_tokens: int,
    eos: int | None,
) -> Array:
    """Compile prefill and a decode loop that stops when every row has ended."""

    def more(carry: tuple[Array, State, Array]) -> Array:
        step, state, _ = carry
        left = step < max_new_tokens
        # Without an end the number of steps is known: nobody waits for the device.
        return left if eos is None else left & ~jnp.all(state.done)

    def extend(carry: tuple[Array, State, Array]) -> tuple[Array, State, Array]:
        step, state, out = carry
        state = _extend(decoder, state, step, drawing, eos)
        return step + 1, state, out.at[:, step].set(state.token)

    state = _begin(model, tokens, lengths, max_new_tokens, drawing, eos)
    shape = (tokens.shape[0], max_new_tokens)
    out = jnp.full(shape, 0 if eos is None else eos, jnp.int32)
    out = out.at[:, 0].set(state.token)
    return jax.lax.while_loop(more, extend, (jnp.int32(1), state, out))[2]


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "eos"))
def _first(
    model: Decoder,
    tokens: Array,
    lengths: Array,
    drawing: Drawing,
    *,
    max_new_tokens: int,
    eos: int | None,
) -> State:
    return _begin(model, tokens, lengths, max_new_tokens, drawing, eos)


@functools.partial(jax.jit, static_argnames=("eos",), donate_argnames=("cache",))
def _next(
    decoder: TokenDecoder,
    token: Array,
    done: Array,
    cache: Cache,
    step: Array,
    drawing: Drawing,
    *,
    eos: int | None,
) -> State:
    return _extend(decoder, State(token, done, cache), step, drawing, eos)


def _steps(
    model: Decoder,
    tokens: Array,
    lengths: Array,
    max_new_tokens: int,
    drawing: Drawing,
    eos: int | None,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Yield each step's tokens; the next step runs while the last one is looked at."""
    decoder = prepare(model, tokens.shape[0])
    size = {"max_new_tokens": max_new_tokens, "eos": eos}
    state = _first(model, tokens, lengths, drawing, **size)
    for step in range(1, max_new_tokens + 1):
        token, done = state.token, state.done
        if step < max_new_tokens:
            state = _next(decoder, *state, jnp.int32(step), drawing, eos=eos)
        yield np.asarray(token)
        if eos is not None and np.all(np.asarray(done)):
            return


def bucket(length: int) -> int:
    """Return the padded length of a prompt: a power of two from 16 on."""
    return max(16, 1 << (length - 1).bit_length())


def pad_prompts(
    prompts: Sequence[Int[np.ndarray, " _"]], room: int
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Return ids as one array, filled up with 0, and their lengths.

    They are as wide as the bucket of the longest, so that other prompts find their
    programs compiled, and no wider than the `room` unless a prompt is.
    """
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    longest = int(lengths.max())
    width = max(longest, min(bucket(longest), room))
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    return jnp.asarray(tokens), jnp.asarray(lengths)


def _settle(
    model: Decoder, tokens: Array, lengths: Array, max_new_tokens: int
) -> tuple[Array, Array]:
    """Return prompts and their lengths as arrays of the device, checked."""
    _check(model.config, tokens.shape, np.asarray(lengths), max_new_tokens)
    return jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32)


def _check(
    config: ModelConfig,
    shape: tuple[int, ...],
    lengths: np.ndarray,
    max_new_tokens: int,
) -> None:
    """Raise ConfigError for prompts or a length that the model can't serve."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
    if lengths.min() < 1 or lengths.max() > shape[1]:
        raise ConfigError(
            f"prompt lengths are {lengths.min()} to {lengths.max()}; each needs 1 to "
            f"{shape[1]} tokens"
        )
    if lengths.max() + max_new_tokens > config.max_seq_len:
        raise ConfigError(
            f"{lengths.max()} prompt tokens + {max_new_tokens} new ones are more than "
            f"max_seq_len {config.max_seq_len}; shorten one of them"
        )
