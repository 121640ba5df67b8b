"""Tokens drawn from logits: the likeliest, or from a filtered distribution."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax.config import ModelConfig
from uoe_jax.errors import ConfigError
from uoe_jax.generate.sampling import Sampling


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "temperature", "top_p"],
    meta_fields=["top_k", "greedy"],
)
@dataclass(frozen=True)
class Drawing:
    """A `Sampling` as a program takes it; `top_k` and `greedy` are fixed in one."""

    key: jax.Array
    temperature: Float[Array, ""]
    top_p: Float[Array, ""] | None
    top_k: int | None
    greedy: bool

    def draw(self, logits: Float[Array, "B V"], step: Any) -> Int[Array, " B"]:
        """Return token number `step` of each row."""
        if self.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return sample(
            logits,
            jax.random.fold_in(self.key, step),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )


def make_drawing(
    config: ModelConfig, sampling: Sampling, key: jax.Array | None
) -> Drawing:
    """Return what draws tokens of a model; raise ConfigError where it has too few."""
    top_k, top_p = sampling.top_k, sampling.top_p
    if top_k is not None and top_k > config.vocab_size:
        raise ConfigError(f"top_k is {top_k}; use 1 to {config.vocab_size}")
    if key is None and not sampling.takes_likeliest:
        raise ConfigError("sampling without a key; pass key=jax.random.key(seed)")
    return Drawing(
        jax.random.key(0) if key is None else key,
        jnp.float32(sampling.temperature),
        None if top_p is None else jnp.float32(top_p),
        top_k,
        sampling.takes_likeliest,
    )


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
