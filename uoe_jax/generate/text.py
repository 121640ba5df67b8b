"""Texts that a trained run makes of prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from uoe_jax.config import ModelConfig
from uoe_jax.data import Tokenizer
from uoe_jax.data.chat import (
    ChatTemplate,
    Message,
    encode_chat,
    end_of_turn,
    text_end,
)
from uoe_jax.data.record import run_tokenizer
from uoe_jax.errors import ConfigError, shown
from uoe_jax.generate.pieces import pieces
from uoe_jax.generate.sampling import Sampling
from uoe_jax.generate.tokens import generate, pad_prompts, stream
from uoe_jax.given import one_of
from uoe_jax.model import Decoder
from uoe_jax.runs.load import LoadedRun


def generate_text(
    run: LoadedRun,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    seed: int = 0,
    on_text: Callable[[bytes], object] | None = None,
    **options: Any,
) -> bytes:
    """Return a prompt and what a run makes of it, as the bytes it made.

    How tokens are drawn is said by `sampling`, or by its fields as `options`. `on_text`
    is called with the prompt, and then with each piece that follows it as soon as it is
    there; all pieces together are what is returned.

    Raises ConfigError for a run that isn't a decoder's, and as `generate` does.
    """
    sampling = one_of("sampling", Sampling, sampling, options)
    if on_text is None:
        return generate_texts(run, [prompt], max_new_tokens, sampling, seed=seed)[0]
    pieces = []
    for piece in stream_text(run, prompt, max_new_tokens, sampling, seed=seed):
        pieces.append(piece)
        on_text(piece)
    return b"".join(pieces)


def generate_texts(
    run: LoadedRun,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    seed: int = 0,
    **options: Any,
) -> list[bytes]:
    """Return each prompt and what a run makes of it, all at once, as bytes.

    Raises ConfigError for a run that isn't a decoder's, for no prompts, and as
    `generate` does.
    """
    sampling = one_of("sampling", Sampling, sampling, options)
    model, tokenizer, encoded = _encode(run, prompts)
    padded = pad_prompts(encoded, model.config.max_seq_len - max_new_tokens)
    key = jax.random.key(seed)
    tokens = generate(model, *padded, max_new_tokens, sampling, key=key)
    return [
        continuation(tokenizer, prompt, ids, row)
        for prompt, ids, row in zip(prompts, encoded, np.asarray(tokens), strict=True)
    ]


def stream_text(
    run: LoadedRun,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    seed: int = 0,
    **options: Any,
) -> Iterator[bytes]:
    """Return an iterator of a prompt and the pieces that a run makes it go on with.

    Together they are what `generate_text` returns. A piece is held back as long as the
    next token may change it: a character whose bytes aren't all there yet.

    Raises ConfigError as `generate_text` does.
    """
    sampling = one_of("sampling", Sampling, sampling, options)
    model, tokenizer, (ids,) = _encode(run, [prompt])
    padded = pad_prompts([ids], model.config.max_seq_len - max_new_tokens)
    key = jax.random.key(seed)
    steps = stream(model, *padded, max_new_tokens, sampling, key=key)
    return pieces(functools.partial(continuation, tokenizer, prompt, ids), steps)


def stream_reply(
    run: LoadedRun,
    template: ChatTemplate,
    messages: Sequence[Message],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    seed: int = 0,
) -> Iterator[bytes]:
    """Return an iterator of the pieces of a run's answer to a conversation.

    Together they are what `generate_all` and `cut_turn` give of it; the end of the turn
    isn't among them, and nothing is made after it.

    Raises ConfigError as `generate_text` does.
    """
    model, tokenizer = need_decoder(run), run_tokenizer(run.folder, run.config)
    ids, eos = (
        encode_chat(tokenizer, template, messages),
        end_of_turn(tokenizer, template),
    )
    padded = pad_prompts([ids], model.config.max_seq_len - max_new_tokens)
    key = jax.random.fold_in(jax.random.key(seed), 0)  # the first of many's
    steps = stream(model, *padded, max_new_tokens, sampling, key=key, eos=eos)
    end = text_end(tokenizer, template)
    return pieces(tokenizer.decode_bytes, steps, eos=eos, end=end)


def need_decoder(run: LoadedRun) -> Decoder:
    """Return a run's model; raise ConfigError for one that doesn't generate."""
    if not isinstance(run.model, Decoder):
        raise ConfigError(
            f"{run.folder} is a {run.config.model.kind} model; only a decoder generates"
        )
    return run.model


def _encode(
    run: LoadedRun, prompts: Sequence[str]
) -> tuple[Decoder, Tokenizer, list[Int[np.ndarray, " T"]]]:
    """Return a run's model and tokenizer, and the ids of prompts."""
    model = need_decoder(run)
    if isinstance(prompts, str) or not len(prompts):
        raise ConfigError(f"prompts are {shown(prompts)}; give a list of texts")
    tokenizer = run_tokenizer(run.folder, run.config)
    ids = [encode_prompt(tokenizer, p, run.config.model) for p in prompts]
    return model, tokenizer, ids


def encode_prompt(
    tokenizer: Tokenizer, prompt: str, config: ModelConfig
) -> Int[np.ndarray, " T"]:
    """Return a prompt's ids; raise ConfigError if it is empty or not the model's."""
    encode = getattr(tokenizer, "encode_prompt", tokenizer.encode)
    ids = encode(prompt)
    if not len(ids):
        raise ConfigError("the prompt is empty; give at least one character")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        wrong = ids.max() if ids.min() >= 0 else ids.min()
        raise ConfigError(
            f"the prompt has token id {wrong}; the model's ids are 0 to "
            f"{config.vocab_size - 1}"
        )
    return ids


def continuation(
    tokenizer: Tokenizer,
    prompt: str,
    prompt_ids: Int[np.ndarray, " T"],
    new_ids: Int[Array, " O"] | Int[np.ndarray, " O"],
) -> bytes:
    """Return a prompt and what follows it, decoded together.

    A decoder may treat the first token otherwise (it drops the blank before a word),
    so the continuation alone would lose what joins the two. Where what follows changes
    how the prompt decodes, the whole is shown as decoded.
    """
    before = tokenizer.decode_bytes(prompt_ids)
    whole = tokenizer.decode_bytes(np.concatenate([prompt_ids, np.asarray(new_ids)]))
    if whole.startswith(before):
        return prompt.encode("utf-8", "replace") + whole[len(before) :]
    return whole
