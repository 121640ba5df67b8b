"""What a model's layers compute on some text, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uoe_jax.model.context import Context, make_context
from uoe_jax.model.transformer import Block
from uoe_jax.weights import layer_period


class LayerValues(NamedTuple):
    """One layer on N tokens, padding left out; on the device, as they are large."""

    attention_input: Any  # [N D], normalised
    heads: Any  # [N Q H], each head's weighted values
    residual: Any  # [N D], what the MLP's output is added to
    mlp_input: Any  # [N D], normalised
    neurons: Any  # [N F], activations, as w_down reads them
    output: Any  # [N D], the MLP's


# A layer as it is run: (block, residual, context) -> what the MLP's output is added to,
# that output, and whatever else is wanted of the layer.
RunLayer = Callable[[Block, Array, Context], tuple[Array, Array, Any]]


class Stream:
    """A batch on its way through a model, one layer after another.

    The batch is one of the run's datasets. One layer is in memory at a time. `valid`
    [B, T] says which tokens aren't padding.
    """

    def __init__(self, model: Any, batch: Mapping[str, np.ndarray | Array]):
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
        self._model, self._context, self.valid = model, context, valid
        self._kept = None if valid.all() else np.flatnonzero(valid)
        self._number, self._residual, self._output = 0, x, jnp.zeros_like(x)
        self._last: Any = None  # the block before the next

    def run_layer(self) -> LayerValues:
        """Return what the next layer of a dense model computes."""
        values = self.step(run_dense)
        rows = [value.reshape(-1, *value.shape[2:]) for value in values]
        if self._kept is not None:
            rows = [jnp.take(value, self._kept, axis=0) for value in rows]
        return LayerValues(*rows)

    def step(self, run: RunLayer) -> Any:
        """Run the next layer by `run`; return what that finds beside the residual."""
        blocks = self._model.trunk.blocks
        stack, index = self._place()
        block = jax.tree.map(lambda a: a[index], blocks[stack])
        x = self._now()
        self._last = block
        self._residual, self._output, found = run(block, x, self._context)
        self._number += 1
        return found

    def replace_output(
        self, output: Float[np.ndarray, "N D"] | Float[Array, "N D"]
    ) -> None:
        """Let the last layer's MLP have written something else."""
        shape, dtype = self._output.shape, self._output.dtype
        rows = jnp.asarray(output, dtype)
        if self._kept is not None:
            empty = jnp.zeros((self.valid.size, shape[-1]), dtype)
            rows = empty.at[self._kept].set(rows)
        self._output = rows.reshape(shape)

    def hidden(self) -> Float[Array, "B T D"]:
        """Return the last hidden state, normalised, once every layer has run."""
        return self._model.trunk.finish(self._now())

    def _now(self) -> Float[Array, "B T D"]:
        """Return the residual with all that was written so far."""
        if self._last is None:
            return self._residual
        return self._last.add(self._last.mlp_norm, self._residual, self._output)

    def _place(self) -> tuple[int, int]:
        period = layer_period(self._model.config)
        return self._number % period, self._number // period


def layer_values(model: Any, batch: Mapping[str, np.ndarray]) -> Iterator[LayerValues]:
    """Yield the values of each layer of a dense model on a batch, as numpy arrays."""
    stream = Stream(model, batch)
    for _ in range(model.config.num_layers):
        yield LayerValues(*map(np.asarray, stream.run_layer()))


_OPTIONS = ("positions", "segments")


@jax.jit
def run_dense(
    block: Block, x: Float[Array, "B T D"], context: Context
) -> tuple[Array, Array, tuple[Array, ...]]:
    """Return what the MLP adds to and its output, and what `LayerValues` holds."""
    first, heads, x = run_attention(block, x, context)
    second = block.before(block.mlp_norm, x)
    neurons, output = run_mlp(block.mlp, second)
    return x, output, (first, heads, x, second, neurons, output)


def run_attention(
    block: Block, x: Float[Array, "B T D"], context: Context
) -> tuple[Array, Array, Array]:
    """Return what dense attention reads, its heads' outputs, and the residual after."""
    attention: Any = block.attention
    first = block.before(block.attention_norm, x)
    heads, _ = attention.attend_heads(first, context)
    added = attention.project_out(heads)
    return first, heads, block.add(block.attention_norm, x, added)


def run_mlp(mlp: Any, x: Array) -> tuple[Array, Array]:
    """Return a dense MLP's activations and its output."""
    neurons = mlp.neurons(x)
    return neurons, mlp.write(neurons)
