"""Text generation: one compiled prefill and decode loop, and sampling rules."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from uoe_jax.config import ModelConfig
from uoe_jax.data import Tokenizer
from uoe_jax.data.record import run_tokenizer
from uoe_jax.errors import ConfigError
from uoe_jax.model import Decoder, init_cache
from uoe_jax.runs.load import LoadedRun


def generate(
    model: Decoder,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
    key: jax.Array | None = None,
    eos: int | None = None,
) -> Int[Array, "B O"]:
    """Return `max_new_tokens` continuations of the prompts `tokens[b, :lengths[b]]`.

    A row that produced `eos` is filled up with it. Temperature 0 is greedy. Raises
    ConfigError for lengths or sampling settings that make no sense.
    """
    greedy = greedy or temperature == 0.0
    _check(model.config, tokens.shape, np.asarray(lengths), max_new_tokens)
    _check_sampling(model.config, temperature, top_k, top_p, greedy, key)
    return _generate(
        model,
        tokens,
        lengths,
        jax.random.key(0) if key is None else key,
        jnp.float32(temperature),
        None if top_p is None else jnp.float32(top_p),
        max_new_tokens=max_new_tokens,
        top_k=top_k,
        greedy=greedy,
        eos=eos,
    )


def generate_text(
    run: LoadedRun,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
    seed: int = 0,
) -> bytes:
    """Return a prompt and what a run makes of it, as the bytes it made.

    Raises ConfigError for a run that isn't a decoder's, and as `generate` does.
    """
    model, config = need_decoder(run), run.config
    tokenizer = run_tokenizer(run.folder, config)
    ids = encode_prompt(tokenizer, prompt, config.model)
    tokens = generate(
        model,
        jnp.asarray(ids, jnp.int32)[None],
        jnp.array([len(ids)], jnp.int32),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        greedy=greedy,
        key=jax.random.key(seed),
    )
    return continuation(tokenizer, prompt, ids, tokens[0])


def need_decoder(run: LoadedRun) -> Decoder:
    """Return a run's model; raise ConfigError for one that doesn't generate."""
    if not isinstance(run.model, Decoder):
        raise ConfigError(
            f"{run.folder} is a {run.config.model.kind} model; only a decoder generates"
        )
    return run.model


def generate_all(
    model: Decoder,
    prompts: Sequence[Int[np.ndarray, " _"]],
    max_new_tokens: int,
    *,
    batch_size: int = 8,
    seed: int = 0,
    eos: int | None = None,
    **sampling: Any,
) -> list[Int[np.ndarray, " _"]]:
    """Return the continuation of each of many prompts, up to its `eos`.

    Prompts of about the same length (up to the same power of two) go together,
    `batch_size` at a time, so that few programs compile. `sampling` as `generate`
    takes it; what is sampled depends on the seed, the batches and the order. Raises
    ConfigError for a `batch_size` below 1, and as `generate` does, the prompt's number
    named.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; use at least 1")
    found: list[Any] = [None] * len(prompts)
    key = jax.random.key(seed)
    for number, chosen in enumerate(_batches(prompts, batch_size)):
        lengths = np.array([len(prompts[index]) for index in chosen])
        room = model.config.max_seq_len - max_new_tokens
        if lengths.max() > room:
            longest = chosen[int(np.argmax(lengths))]
            raise ConfigError(
                f"prompt {longest + 1} has {lengths.max()} tokens; with "
                f"{max_new_tokens} new ones at most {max(room, 0)} fit into "
                f"max_seq_len {model.config.max_seq_len}"
            )
        width = min(_bucket(int(lengths.max())), room)
        rows = np.zeros((len(chosen), width), np.int32)
        for row, index in enumerate(chosen):
            rows[row, : lengths[row]] = prompts[index]
        made = generate(
            model,
            jnp.asarray(rows),
            jnp.asarray(lengths, jnp.int32),
            max_new_tokens,
            key=jax.random.fold_in(key, number),
            eos=eos,
            **sampling,
        )
        for index, row in zip(chosen, np.asarray(made), strict=True):
            end = np.flatnonzero(row == eos)
            found[index] = row[: end[0]] if len(end) else row
    return found


def _bucket(length: int) -> int:
    """Return the padded length: a power of two from 16 on."""
    return max(16, 1 << (length - 1).bit_length())


def _batches(prompts: Sequence[Any], size: int) -> Iterator[list[int]]:
    """Yield the prompts' numbers in batches of one padded length.

    All batches are of one size: the last repeats a prompt to fill up.
    """
    size = min(size, len(prompts))
    order = sorted(range(len(prompts)), key=lambda n: _bucket(len(prompts[n])))
    groups = itertools.groupby(order, key=lambda n: _bucket(len(prompts[n])))
    for _, group in groups:
        numbers = list(group)
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            yield part + part[-1:] * (size - len(part))


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


def sample(
    logits: Float[Array, "B V"],
    key: jax.Array,
    *,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int | None = None,
    top_p: float | Float[Array, ""] | None = None,
) -> Int[Array, " B"]:
    """Return one token a row from the filtered distribution, temperature first."""
    logits = logits / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def keep_top_k(logits: Float[Array, "B V"], top_k: int) -> Float[Array, "B V"]:
    """Set all but the `top_k` highest logits of each row to -inf (ties all stay)."""
    lowest = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < lowest, -jnp.inf, logits)


def keep_top_p(
    logits: Float[Array, "B V"], top_p: float | Float[Array, ""]
) -> Float[Array, "B V"]:
    """Keep the fewest most likely tokens whose probabilities reach `top_p`.

    Nucleus sampling (Holtzman et al. 2019, eq. 2); at least one token is kept.
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(ordered, axis=-1)
    # The mass before a token, so that the token which crosses top_p stays.
    before = jnp.cumsum(probs, axis=-1) - probs
    inside = (before < top_p).at[:, 0].set(True)
    lowest = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < lowest, -jnp.inf, logits)


@functools.partial(
    jax.jit, static_argnames=("max_new_tokens", "top_k", "greedy", "eos")
)
def _generate(
    model: Decoder,
    tokens: Array,
    lengths: Array,
    key: jax.Array,
    temperature: Array,
    top_p: Array | None,
    *,
    max_new_tokens: int,
    top_k: int | None,
    greedy: bool,
    eos: int | None,
) -> Array:
    """Compile prefill and a decode loop that stops when every row has ended."""
    batch, length = tokens.shape

    def pick(logits: Array, step: Any) -> Array:
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        step_key = jax.random.fold_in(key, step)
        return sample(
            logits, step_key, temperature=temperature, top_k=top_k, top_p=top_p
        )

    def ended(token: Array) -> Array:
        return jnp.zeros(batch, bool) if eos is None else token == eos

    def more(state: tuple[Any, ...]) -> Array:
        step, _, done, _, _ = state
        return (step < max_new_tokens) & ~jnp.all(done)

    def extend(state: tuple[Any, ...]) -> tuple[Any, ...]:
        step, token, done, out, cache = state
        logits, cache = model.decode(token, cache)
        token = pick(logits, step)
        if eos is not None:
            token = jnp.where(done, eos, token)
        return step + 1, token, done | ended(token), out.at[:, step].set(token), cache

    cache = init_cache(model.config, batch, length + max_new_tokens)
    logits, cache = model.prefill(tokens, lengths.astype(jnp.int32), cache)
    token = pick(logits, 0)
    out = jnp.full((batch, max_new_tokens), 0 if eos is None else eos, jnp.int32)
    out = out.at[:, 0].set(token)
    state = (jnp.int32(1), token, ended(token), out, cache)
    return jax.lax.while_loop(more, extend, state)[3]


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


def _check_sampling(
    config: ModelConfig,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    greedy: bool,
    key: jax.Array | None,
) -> None:
    """Raise ConfigError for sampling settings out of range."""
    if temperature < 0:
        raise ConfigError(f"temperature is {temperature}; use 0 (greedy) or more")
    if top_k is not None and not 1 <= top_k <= config.vocab_size:
        raise ConfigError(f"top_k is {top_k}; use 1 to {config.vocab_size}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p}; use a probability above 0, at most 1")
    if key is None and not greedy:
        raise ConfigError("sampling without a key; pass key=jax.random.key(seed)")
