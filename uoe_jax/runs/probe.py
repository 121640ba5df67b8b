"""How far two models are apart on a batch: logits and losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uoe_jax.config import ModelConfig

TOLERANCE = 1e-5  # of float32 logits, times the largest logit where that is above 1
_CHUNK = 4096  # tokens whose logits are alive at once


class ProbeResult(NamedTuple):
    """A model beside a reference on the same batch, in float32."""

    max_logit_difference: float
    max_logit: float  # largest reference logit, by size
    reference_loss: float  # nats per token or example
    loss: float

    @property
    def exact(self) -> bool:
        """Whether the logits agree up to rounding."""
        return self.max_logit_difference <= TOLERANCE * max(1.0, self.max_logit)


def in_float32(config: ModelConfig) -> ModelConfig:
    """Return a config that computes in float32, without operands of eight bits."""
    return dataclasses.replace(config, compute_dtype="float32", float8="none")


def probe(reference: Any, model: Any, batch: Mapping[str, np.ndarray]) -> ProbeResult:
    """Return logits and losses of two models on a batch of the run's own data.

    Products are made at full float32 precision, whatever the device's default. Give
    models of an `in_float32` config.
    """
    return probe_each(reference, {"model": model}, batch)["model"]


def probe_each(
    reference: Any, models: Mapping[str, Any], batch: Mapping[str, np.ndarray]
) -> dict[str, ProbeResult]:
    """Return what `probe` does for several models, by name; the reference runs once."""
    totals = {name: np.zeros(5) for name in models}
    with jax.default_matmul_precision("highest"):
        for part in _chunks(batch):
            first = _reference_logits(reference, part)
            for name, model in models.items():
                found = np.asarray(_compare(first, model, part))
                totals[name][:2] = np.maximum(totals[name][:2], found[:2])
                totals[name][2:] += found[2:]
    return {name: _result(total) for name, total in totals.items()}


def _result(total: Float[np.ndarray, " 5"]) -> ProbeResult:
    difference, largest, first, second, weight = total.tolist()
    weight = max(weight, 1.0)
    return ProbeResult(difference, largest, first / weight, second / weight)


def mean_loss(model: Any, batch: Mapping[str, np.ndarray]) -> float:
    """Return a model's loss on a batch, nats a token or example, computed as `probe`.

    Models of the same shapes are scored by one program.
    """
    total = np.zeros(2)
    with jax.default_matmul_precision("highest"):
        for part in _chunks(batch):
            total += np.asarray(_score(model, part))
    return float(total[0] / max(total[1], 1.0))


def hidden_loss(
    model: Any, hidden: Float[Array, "B T D"], batch: Mapping[str, np.ndarray]
) -> float:
    """Return the loss that a language model's head has on last hidden states."""
    total, start = np.zeros(2), 0
    with jax.default_matmul_precision("highest"):
        for part in _chunks(batch):
            end = start + len(part["tokens"])
            total += np.asarray(_score_hidden(model, hidden[start:end], part))
            start = end
    return float(total[0] / max(total[1], 1.0))


def _chunks(batch: Mapping[str, np.ndarray]) -> list[dict[str, Array]]:
    first = next(iter(batch.values()))
    length = batch["tokens"].shape[1] if "tokens" in batch else 64
    rows = max(_CHUNK // length, 1)
    return [
        {name: jnp.asarray(a[i : i + rows]) for name, a in batch.items()}
        for i in range(0, len(first), rows)
    ]


@jax.jit
def _reference_logits(model: Any, batch: dict[str, Array]) -> Float[Array, "*N V"]:
    return logits(model, batch)


@jax.jit
def _compare(
    first: Float[Array, "*N V"], model: Any, batch: dict[str, Array]
) -> Float[Array, " 5"]:
    """Return [difference, largest logit, two summed losses, weight].

    `first` are the reference's logits.
    """
    targets, weights = _targets(batch)
    second = logits(model, batch)
    counts = (weights > 0)[..., None]
    difference = jnp.max(jnp.where(counts, jnp.abs(first - second), 0.0))
    largest = jnp.max(jnp.where(counts, jnp.abs(first), 0.0))
    losses = [_nll(found, targets, weights) for found in (first, second)]
    return jnp.stack([difference, largest, *losses, jnp.sum(weights)])


@jax.jit
def _score(model: Any, batch: dict[str, Array]) -> Array:
    """Return [summed loss, weight]."""
    targets, weights = _targets(batch)
    return jnp.stack([_nll(logits(model, batch), targets, weights), jnp.sum(weights)])


@jax.jit
def _score_hidden(model: Any, hidden: Array, batch: dict[str, Array]) -> Array:
    targets, weights = _targets(batch)
    found = _nll(model.logits(hidden), targets, weights)
    return jnp.stack([found, jnp.sum(weights)])


def _targets(batch: Mapping[str, Array]) -> tuple[Array, Array]:
    """Return what is to be predicted, and whether it counts."""
    if "targets" in batch:
        return batch["targets"], batch["mask"]
    labels = batch["labels"]
    return jnp.maximum(labels, 0), (labels >= 0).astype(jnp.float32)


def _nll(logits: Array, targets: Array, weights: Array) -> Array:
    """Return the summed loss of logits, nats."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * weights)


def logits(model: Any, batch: Mapping[str, Array]) -> Float[Array, "*N V"]:
    """Return a model's logits of a dataset's batch."""
    if "images" in batch:
        return model(batch["images"])[0]
    names = ("positions", "segments") if "targets" in batch else ("segments",)
    return model(batch["tokens"], **{name: batch[name] for name in names})[0]
