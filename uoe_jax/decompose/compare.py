"""Groupings side by side on held-out data, before anything is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from uoe_jax.config import ModelConfig
from uoe_jax.decompose.cut import Cut
from uoe_jax.decompose.group import GROUPINGS
from uoe_jax.decompose.plan import Batch, Decided, Plan, as_written, decide
from uoe_jax.errors import ConfigError
from uoe_jax.model import with_params
from uoe_jax.runs.probe import in_float32, mean_loss


class Compared(NamedTuple):
    """One cut on held-out data: each layer's error, the whole model's loss."""

    cut: Cut
    errors: list[float]  # of MLPs' outputs, as the routers choose
    oracle: list[float]  # had each token the experts that write most for it
    loss: float  # nats a token or an example

    def as_row(self) -> dict[str, Any]:
        """Return what a report says of it."""
        return {
            "grouping": self.cut.grouping,
            "error": float(np.mean(self.errors)),
            "worst_error": max(self.errors),
            "worst_layer": int(np.argmax(self.errors)),
            "oracle_error": float(np.mean(self.oracle)),
            "loss": self.loss,
            "errors": self.errors,
        }


def compare_groupings(
    model: Any, union: ModelConfig, cut: Cut, batch: Batch, held: Batch
) -> tuple[Plan, list[Compared]]:
    """Return the plan with the lowest held-out loss, and every grouping's figures.

    `model` is dense and computes in float32; `batch` calibrates, `held` is other data.
    The first of equals is taken. Raises ConfigError where every expert is chosen.
    """
    if cut.chosen == cut.experts:
        raise ConfigError(
            f"groupings lose nothing where a token uses all {cut.experts} experts; "
            "give a smaller top_k"
        )
    cuts = [dataclasses.replace(cut, grouping=name) for name in GROUPINGS]
    found = [Decided(union, each) for each in cuts]
    decide(model, found, batch, held)
    rows, best = measure_losses(model, found, held)
    return found[best].plan(model), rows


def measure_losses(
    model: Any, found: Sequence[Decided], held: Mapping[str, np.ndarray]
) -> tuple[list[Compared], int]:
    """Return the figures of each decided cut, and which has the lowest loss."""
    rows = []
    for each in found:
        loss = each.loss
        if loss is None:
            params, biases = as_written(each.plan(model), each.union)
            loss = mean_loss(with_params(in_float32(each.union), params, biases), held)
        errors = [each.errors[number] for number in sorted(each.errors)]
        rows.append(
            Compared(
                cut=each.cut,
                errors=[error.routed for error in errors],
                oracle=[error.oracle for error in errors],
                loss=loss,
            )
        )
    return rows, int(np.argmin([row.loss for row in rows]))
