"""What a dense model's layers compute on some text, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uoe_jax.model.context import Context, make_context
from uoe_jax.model.transformer import Block
from uoe_jax.weights import layer_period


class LayerValues(NamedTuple):
    """One layer on N tokens, padding left out."""

    attention_input: Float[np.ndarray, "N D"]  # normalised
    heads: Float[np.ndarray, "N Q H"]  # each head's weighted values
    residual: Float[np.ndarray, "N D"]  # what the MLP's output is added to
    mlp_input: Float[np.ndarray, "N D"]  # normalised
    neurons: Float[np.ndarray, "N F"]  # activations, as w_down reads them
    output: Float[np.ndarray, "N D"]  # the MLP's


class Stream:
    """A batch on its way through a dense model, one layer after another.

    The batch is one of the run's datasets. One layer is in memory at a time.
    """

    def __init__(self, model: Any, batch: Mapping[str, np.ndarray]):
        config = model.config
        if "images" in batch:
            x = model.embed(jnp.asarray(batch["images"]))
            context = make_context(config, x.shape[:2])
            valid = np.ones(x.shape[:2], bool)
        else:
            tokens = jnp.asarray(batch["tokens"])
            known: dict[str, Any] = {
                k: jnp.asarray(v) for k, v in batch.items() if k in _OPTIONS
            }
            context = make_context(config, tokens.shape, **known)
            x = model.embed(tokens, context.positions)
            valid = np.asarray(batch["segments"]) != 0
        self._model, self._context, self._valid = model, context, valid
        self._number, self._residual, self._output = 0, x, jnp.zeros_like(x)
        self._last: Any = None  # the block before the next

    def run_layer(self) -> LayerValues:
        """Return what the next layer computes."""
        blocks = self._model.trunk.blocks
        stack, index = self._place()
        block = jax.tree.map(lambda a: a[index], blocks[stack])
        x, last = self._residual, self._last
        if last is not None:
            x = last.add(last.mlp_norm, x, self._output)
        self._last = block
        self._residual, self._output, values = _run_layer(block, x, self._context)
        self._number += 1
        return LayerValues(*(np.asarray(value)[self._valid] for value in values))

    def replace_output(self, output: Float[np.ndarray, "N D"]) -> None:
        """Let the last layer's MLP have written something else."""
        whole = np.zeros(self._output.shape, np.float32)
        whole[self._valid] = output
        self._output = jnp.asarray(whole, self._output.dtype)

    def _place(self) -> tuple[int, int]:
        period = layer_period(self._model.config)
        return self._number % period, self._number // period


def layer_values(model: Any, batch: Mapping[str, np.ndarray]) -> Iterator[LayerValues]:
    """Yield the values of each layer of a dense model on a batch, in order."""
    stream = Stream(model, batch)
    for _ in range(model.config.num_layers):
        yield stream.run_layer()


_OPTIONS = ("positions", "segments")


@jax.jit
def _run_layer(
    block: Block, x: Float[Array, "B T D"], context: Context
) -> tuple[Array, Array, tuple[Array, ...]]:
    """Return what the MLP adds to and its output, and what `LayerValues` holds."""
    attention: Any = block.attention
    first = block.before(block.attention_norm, x)
    heads, _ = attention.attend_heads(first, context)
    x = block.add(block.attention_norm, x, attention.project_out(heads))
    second = block.before(block.mlp_norm, x)
    mlp: Any = block.mlp
    neurons = mlp.neurons(second)
    output = mlp.write(neurons)
    return x, output, (first, heads, x, second, neurons, output)
