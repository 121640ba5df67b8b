"""How a token is drawn from logits: greedy, or from a filtered distribution."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uoe_jax.config import ModelConfig
from uoe_jax.errors import ConfigError


class Sampling(NamedTuple):
    """How a token is drawn from logits; `temperature` and `top_p` are arrays."""

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


def make_sampling(
    config: ModelConfig,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    greedy: bool,
    key: jax.Array | None,
) -> Sampling:
    """Return sampling settings, checked. Temperature 0 is greedy."""
    greedy = greedy or temperature == 0.0
    _check_sampling(config, temperature, top_k, top_p, greedy, key)
    return Sampling(
        jax.random.key(0) if key is None else key,
        jnp.float32(temperature),
        None if top_p is None else jnp.float32(top_p),
        top_k,
        greedy,
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
