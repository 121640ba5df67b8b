"""Decoder language model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from uoe_jax.config import ModelConfig
from uoe_jax.model.balance import Aux
from uoe_jax.model.cache import Cache
from uoe_jax.model.context import Context, make_context
from uoe_jax.model.decode import decode_layers, prefill_layers
from uoe_jax.model.embed import Head, TokenEmbedding, output_logits
from uoe_jax.model.trunk import Trunk


class Decoder(nnx.Module):
    """Causal transformer over tokens.

    All forward methods take `positions` [B, T] (default 0..T-1), `segments` [B, T]
    (document ids, 0 is padding; default one document), `key` and `train` (dropout needs
    both), `axis_name` (mesh axis to sum balance statistics over, inside shard_map) and
    `collect_choices` (adds the chosen experts to the statistics).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = TokenEmbedding(config, rngs=rngs)
        self.trunk = Trunk(config, rngs=rngs)
        tied, vocab = config.tie_embeddings, config.vocab_size
        self.head = None if tied else Head(config, vocab, False, rngs=rngs)

    def __call__(
        self, tokens: Int[Array, "B T"], **options: Any
    ) -> tuple[Float[Array, "B T V"], Aux]:
        """Return float32 logits and router statistics."""
        x, aux = self.hidden(tokens, **options)
        return self.logits(x), aux

    def hidden(
        self, tokens: Int[Array, "B T"], **options: Any
    ) -> tuple[Float[Array, "B T2 D"], Aux]:
        """Return the normalised last hidden state and router statistics; see Trunk."""
        context = self._context(tokens.shape, options)
        return self.trunk(self.embed(tokens, context.positions), context)

    def hidden_from_embeddings(
        self, x: Float[Array, "B T D"], **options: Any
    ) -> tuple[Float[Array, "B T D"], Aux]:
        """Return what `hidden` does, from the output of `embed`."""
        return self.trunk(x, self._context(x.shape[:2], options))

    def logits(self, x: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """Return float32 logits of hidden states."""
        if self.head is not None:
            return self.head(x)
        return output_logits(x, self.embed.embedding[...].T)

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Fill an empty cache with prompts; return the logits after each one's end.

        Row b is `tokens[b, :lengths[b]]`, at least one token; the rest is ignored.
        """
        options = {"collect_choices": True, "lengths": lengths}
        context = self._context(tokens.shape, options)
        x = self.embed(tokens, context.positions)
        x, layers = prefill_layers(self.trunk, x, context, cache.layers)
        x = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0]
        return self.logits(x), Cache(lengths, layers)

    def decode(
        self, token: Int[Array, " B"], cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Append one token to each row; return the logits after it."""
        x = self.embed(token, cache.lengths)
        x, layers = decode_layers(self.trunk, x, cache.layers, cache.lengths)
        return self.logits(x), Cache(cache.lengths + 1, layers)

    def _context(self, shape: tuple[int, ...], options: dict[str, Any]) -> Context:
        return make_context(self.config, shape, **options)


def routing_choices(
    model: nnx.Module, inputs: jax.Array, **options: Any
) -> dict[str, Int[Array, "L B T X"]]:
    """Return the experts each token chose, by part, for the routed layers in order."""
    _, aux = model(inputs, collect_choices=True, **options)  # pyrefly: ignore
    return {part: stats["choices"] for part, stats in aux.items()}
