"""Second moments of what a model's layers compute on a text: one pass for all methods.

Sums are made batch by batch in float32 at full precision and added up in float64 on the
host. Several devices share the rows of a batch and add up their sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from uoe_jax.compress.devices import begin
from uoe_jax.config import ModelConfig
from uoe_jax.errors import ConfigError
from uoe_jax.model.context import Context
from uoe_jax.model.layers import project
from uoe_jax.model.mlp import activate
from uoe_jax.model.observe import run_attention, run_mlp
from uoe_jax.model.transformer import Block
from uoe_jax.partition.mesh import replicated

# Of a calibration text, on each device; the sums don't depend on a run's batches.
TOKENS_AT_ONCE = 4096
_HIGHEST = jax.lax.Precision.HIGHEST
# Which sums are symmetric matrices.
SYMMETRIC = (
    "attention_input",
    "heads",
    "mlp_input",
    "neurons",
    "all_neurons",
    "head_input",
)


class LayerStatistics(NamedTuple):
    """Sums over the tokens of one layer; attention's are empty where it is routed.

    Of a union's MLP an expert's neurons are those of the tokens that chose it, times
    its gate, as `w_down` reads them. A dense MLP is one expert.
    """

    tokens: Float[np.ndarray, ""]
    attention_input: Float[np.ndarray, "D D"]  # second moment
    attention_mean: Float[np.ndarray, " D"]  # sum
    query_squares: Float[np.ndarray, "K G H"]
    key_squares: Float[np.ndarray, "K H"]
    heads: Float[np.ndarray, "QH QH"]  # second moment of what the output reads
    heads_mean: Float[np.ndarray, " QH"]
    mlp_input: Float[np.ndarray, "D D"]
    mlp_mean: Float[np.ndarray, " D"]
    expert_tokens: Float[np.ndarray, " E"]  # that chose it
    neurons: Float[np.ndarray, "E F F"]
    neurons_mean: Float[np.ndarray, "E F"]
    # Of a union: the same of all tokens without gates, for experts that few chose.
    all_neurons: Float[np.ndarray, "E F F"]
    all_neurons_mean: Float[np.ndarray, "E F"]
    likeness: Float[np.ndarray, ""]  # sum of cos(residual before, after the layer)
    inverse_square: Float[np.ndarray, ""]  # sum of 1 / |residual before the MLP|^2
    # Of the last layer, empty elsewhere: second moment of what the head reads.
    head_input: Float[np.ndarray, "D D"]

    @property
    def influence(self) -> float:
        """Block Influence: 1 - E cos(before, after) (Men et al. 2024, ShortGPT)."""
        return 1 - float(self.likeness) / max(float(self.tokens), 1.0)

    @property
    def residual_square(self) -> float:
        """The residual's squared length: its harmonic mean, as few tokens are huge."""
        return float(self.tokens) / max(float(self.inverse_square), 1e-30)


def check_kinds(model: ModelConfig) -> None:
    """Raise ConfigError for a model with parts that aren't observed."""
    if model.additions:
        raise ConfigError(
            f"the model has {model.additions[0]}; compressed are dense layers and "
            "unions without it"
        )
    known = ("attention dense", "attention union", "mlp dense", "mlp union")
    for number, (attention, mlp) in enumerate(model.layer_kinds):
        block = model.block_kinds[number]
        kinds = (f"attention {attention}", f"mlp {mlp}", f"block {block}")
        if other := [kind for kind in kinds if kind not in (*known, "block all")]:
            raise ConfigError(
                f"layer {number} has {other[0]}; compressed are dense layers and unions"
            )


def observe(
    model: Any,
    batch: Mapping[str, np.ndarray],
    tokens_at_once: int = TOKENS_AT_ONCE,
    mesh: Mesh | None = None,
) -> tuple[LayerStatistics, ...]:
    """Return each layer's sums over a batch, `tokens_at_once` in memory at a time.

    With a mesh of one axis, `data`, each of its devices holds the whole model and takes
    as many tokens at a time.

    Raises ConfigError for a model with kinds that aren't dense or union.
    """
    check_kinds(model.config)
    rows = len(next(iter(batch.values())))
    length = model.config.num_image_tokens
    if "tokens" in batch:
        length = batch["tokens"].shape[1]
    step = max(tokens_at_once // length, 1)
    if mesh is not None:
        step *= mesh.size
        model = jax.device_put(model, replicated(mesh))
    totals: list[dict[str, np.ndarray] | None] = [None] * model.config.num_layers
    with jax.default_matmul_precision("highest"):
        for start in range(0, rows, step):
            part = {k: v[start : start + step] for k, v in batch.items()}
            stream, run = begin(model, part, mesh, _observe)
            for number in range(len(totals)):
                sums = stream.step(run)
                sums["head_input"] = jnp.zeros((0, 0))
                if number + 1 == len(totals):
                    hidden = stream.hidden()
                    sums["head_input"] = _head_moment(hidden, stream.valid)
                totals[number] = _added(totals[number], sums)
    narrow = lambda total: LayerStatistics(
        **{k: _narrowed(k, np.asarray(v, np.float32)) for k, v in total.items()}
    )
    return tuple(narrow(total) for total in totals)


def _narrowed(name: str, sums: np.ndarray) -> np.ndarray:
    """Return sums, a symmetric matrix by its lower triangle.

    Some processors round its two halves apart, and a file keeps one.
    """
    if name not in SYMMETRIC:
        return sums
    return np.tril(sums) + np.swapaxes(np.tril(sums, -1), -1, -2)


def _added(
    total: dict[str, np.ndarray] | None, sums: Mapping[str, Array]
) -> dict[str, np.ndarray]:
    """Return float64 sums with a batch's added, in place."""
    if total is None:
        return {name: np.asarray(value, np.float64) for name, value in sums.items()}
    for name, value in sums.items():
        total[name] += np.asarray(value)
    return total


@jax.jit
def _observe(
    block: Block, x: Float[Array, "B T D"], context: Context, *, valid: Array
) -> tuple[Array, Array, dict[str, Array]]:
    """Return what the MLP adds to, its output, and one batch's `LayerStatistics`."""
    # Its words are no arrays, which the traced ones would be.
    context = Context(context.positions, context.segments, None, None, False)
    attention: Any = block.attention
    mask = valid.reshape(-1)
    flat = lambda a: a.reshape(mask.size, -1)
    counted = lambda a: jnp.where(mask[:, None], flat(a), 0)
    if hasattr(attention, "router"):
        first = block.before(block.attention_norm, x)
        residual = block.add(block.attention_norm, x, attention(first, context)[0])
        sums = _no_attention(x.dtype)
    else:
        first, heads, residual = run_attention(block, x, context)
        sums = _attention_sums(attention, counted(first), counted(heads), mask)
    second = block.before(block.mlp_norm, residual)
    gates = mask[None].astype(x.dtype)
    every = jnp.zeros((0, 0, 0), x.dtype), jnp.zeros((0, 0), x.dtype)
    if hasattr(block.mlp, "router"):
        neurons, output = _run_experts(block.mlp, second, context)
        every = _gated_moments(flat(neurons), jnp.tile(gates, (len(block.mlp.w_up), 1)))
        gates *= _gates(block.mlp, second, context)
    else:
        neurons, output = run_mlp(block.mlp, second)
    after = block.add(block.mlp_norm, residual, output)
    sums |= _mlp_sums(counted(second), flat(neurons), gates)
    sums |= dict(zip(("all_neurons", "all_neurons_mean"), every, strict=True))
    sums |= _residual_sums(flat(x), flat(residual), flat(after), mask)
    return residual, output, sums


def _gates(part: Any, x: Array, context: Context) -> Float[Array, "E N"]:
    """Return each expert's gate for each token, 0 where it isn't chosen."""
    routing = part.router(x, context)
    experts = part.w_up.shape[0]
    hot = jax.nn.one_hot(routing.choices, experts, dtype=x.dtype, axis=0)
    return (hot * routing.gates[None]).sum(-1).reshape(experts, -1)


def _run_experts(
    mlp: Any, x: Float[Array, "B T D"], context: Context
) -> tuple[Float[Array, "B T F"], Float[Array, "B T D"]]:
    """Return every expert's activations, chosen or not, and the routed MLP's output."""
    bias = lambda b: 0.0 if b is None else b[...].reshape(1, 1, *b.shape)
    part = lambda w, b: jnp.einsum("btd,edf->btef", x, w[...].astype(x.dtype)) + bias(b)
    gate = None if mlp.w_gate is None else part(mlp.w_gate, mlp.b_gate)
    neurons = activate(part(mlp.w_up, mlp.b_up), gate, mlp.exact)
    neurons = neurons.reshape(*x.shape[:2], -1)
    return neurons, mlp(x, context)[0]


def _moment(x: Float[Array, "N D"]) -> Float[Array, "D D"]:
    return jnp.dot(x.T, x, precision=_HIGHEST)


@jax.jit
def _head_moment(
    hidden: Float[Array, "B T D"], valid: Bool[Array, "B T"]
) -> Float[Array, "D D"]:
    """Return the second moment of the last hidden state, padding left out."""
    rows = jnp.where(valid[..., None], hidden, 0)
    return _moment(rows.reshape(-1, hidden.shape[-1]))


def _no_attention(dtype: Any) -> dict[str, Array]:
    """Return the empty sums of attention that is routed."""
    axes = {
        "attention_input": 2, "attention_mean": 1, "query_squares": 3,
        "key_squares": 2, "heads": 2, "heads_mean": 1,
    }  # fmt: skip
    return {name: jnp.zeros((0,) * count, dtype) for name, count in axes.items()}


def _attention_sums(
    attention: Any, x: Float[Array, "N D"], heads: Float[Array, "N QH"], mask: Array
) -> dict[str, Array]:
    """Return sums of what dense attention reads and makes; padded rows are zero."""

    def squares(weight: Any, bias: Any, norm: Any) -> Array:
        matrix = weight[0].reshape(x.shape[1], -1)
        y = project(x, matrix, None if bias is None else bias[0].reshape(-1))
        y = y.reshape(-1, *weight.shape[2:])
        # Rotation leaves the square of a pair as it is, so it isn't done.
        y = y if norm is None else norm(y)
        return jnp.einsum(
            "n,n...->...", mask.astype(y.dtype), y * y, precision=_HIGHEST
        )

    return {
        "attention_input": _moment(x),
        "attention_mean": x.sum(0),
        "query_squares": squares(attention.wq, attention.bq, attention.q_norm),
        "key_squares": squares(attention.wk, attention.bk, attention.k_norm),
        "heads": _moment(heads),
        "heads_mean": heads.sum(0),
    }


def _mlp_sums(
    x: Float[Array, "N D"], neurons: Float[Array, "N EF"], gates: Float[Array, "E N"]
) -> dict[str, Array]:
    """Return sums of what the MLP reads and of its neurons times their gates."""
    moments, means = _gated_moments(neurons, gates)
    return {
        "mlp_input": _moment(x),
        "mlp_mean": x.sum(0),
        "expert_tokens": (gates != 0).astype(x.dtype).sum(1),
        "neurons": moments,
        "neurons_mean": means,
    }


def _gated_moments(
    neurons: Float[Array, "N EF"], gates: Float[Array, "E N"]
) -> tuple[Float[Array, "E F F"], Float[Array, "E F"]]:
    """Return second moments and sums of each expert's neurons times their gates."""
    experts, tokens = gates.shape
    parts = jnp.moveaxis(neurons.reshape(tokens, experts, -1), 1, 0)

    def one(item: tuple[Array, Array]) -> tuple[Array, Array]:
        part, gate = item
        scaled = part * gate[:, None]
        return _moment(scaled), scaled.sum(0)

    return jax.lax.map(one, (parts, gates))


def _residual_sums(
    before: Float[Array, "N D"],
    between: Float[Array, "N D"],
    after: Float[Array, "N D"],
    mask: Array,
) -> dict[str, Array]:
    """Return sums of how like the residual is itself after a layer, and of its size."""
    square = lambda a: jnp.maximum(jnp.sum(a * a, axis=1), 1e-30)
    likeness = (before * after).sum(1) * jax.lax.rsqrt(square(before) * square(after))
    sums = lambda a: jnp.where(mask, a, 0).sum()
    return {
        "tokens": mask.astype(before.dtype).sum(),
        "likeness": sums(likeness),
        "inverse_square": sums(1 / square(between)),
    }
