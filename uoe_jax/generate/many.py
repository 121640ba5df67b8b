"""Many prompts of different lengths, in batches that share few programs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from uoe_jax.errors import ConfigError
from uoe_jax.generate.sampling import Sampling
from uoe_jax.generate.tokens import bucket, generate, pad_prompts
from uoe_jax.given import one_of
from uoe_jax.model import Decoder


def generate_all(
    model: Decoder,
    prompts: Sequence[Int[np.ndarray, " _"]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    batch_size: int = 8,
    seed: int = 0,
    eos: int | None = None,
    **options: Any,
) -> list[Int[np.ndarray, " _"]]:
    """Return the continuation of each of many prompts, up to its `eos`.

    Prompts of about the same length (up to the same power of two) go together,
    `batch_size` at a time, so that few programs compile. `sampling` and `options` as
    `generate` takes them; what is sampled depends on the seed, the batches and the
    order. Raises ConfigError for a `batch_size` below 1, and as `generate` does, the
    prompt's number named.
    """
    sampling = one_of("sampling", Sampling, sampling, options)
    how = {"batch_size": batch_size, "seed": seed, "eos": eos}
    found = dict(generate_each(model, prompts, max_new_tokens, sampling, **how))
    return [found[index] for index in range(len(prompts))]


def generate_each(
    model: Decoder,
    prompts: Sequence[Int[np.ndarray, " _"]],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    batch_size: int = 8,
    seed: int = 0,
    eos: int | None = None,
) -> Iterator[tuple[int, Int[np.ndarray, " _"]]]:
    """Return an iterator of prompts' indices and continuations, as they come.

    That is batch by batch, those of short prompts first; `generate_all` puts them in
    order. Requests that can't be raise ConfigError here, not at the first one.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; use at least 1")
    room = model.config.max_seq_len - max_new_tokens
    longest = max(range(len(prompts)), key=lambda n: len(prompts[n]), default=None)
    if longest is not None and len(prompts[longest]) > room:
        raise ConfigError(
            f"prompt {longest + 1} has {len(prompts[longest])} tokens; with "
            f"{max_new_tokens} new ones at most {max(room, 0)} fit into "
            f"max_seq_len {model.config.max_seq_len}"
        )
    key = jax.random.key(seed)

    def each() -> Iterator[tuple[int, Int[np.ndarray, " _"]]]:
        for number, chosen in enumerate(_batches(prompts, batch_size)):
            made = generate(
                model,
                *pad_prompts([prompts[index] for index in chosen], room),
                max_new_tokens,
                sampling,
                key=jax.random.fold_in(key, number),
                eos=eos,
            )
            # A batch's last prompt may be there several times.
            for index, row in dict(zip(chosen, np.asarray(made), strict=True)).items():
                end = np.flatnonzero(row == eos)
                yield index, row[: end[0]] if len(end) else row

    return each()


def _batches(prompts: Sequence[Any], size: int) -> Iterator[list[int]]:
    """Yield the prompts' numbers in batches of one padded length.

    All batches are of one size: the last repeats a prompt to fill up.
    """
    size = min(size, len(prompts))
    order = sorted(range(len(prompts)), key=lambda n: bucket(len(prompts[n])))
    groups = itertools.groupby(order, key=lambda n: bucket(len(prompts[n])))
    for _, group in groups:
        numbers = list(group)
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            yield part + part[-1:] * (size - len(part))
