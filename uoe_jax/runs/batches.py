"""Batches of a run's own data: to calibrate on, and to compare models on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from uoe_jax.config import ExperimentConfig
from uoe_jax.data import Dataset, make_dataset
from uoe_jax.data.order import eval_order
from uoe_jax.errors import ConfigError, DataError
from uoe_jax.hardware.count import num_tokens

Batch = Mapping[str, np.ndarray]
CALIBRATION_TOKENS = PROBE_TOKENS = 16_384


def probe_batch(data: Dataset, tokens: int = PROBE_TOKENS) -> Batch:
    """Return the first examples of a split's fixed order, about `tokens` of them."""
    length = num_tokens(data.config.model, data.config.seq_len)
    rows = min(max(tokens // length, 1), data.num_examples)
    return data.examples(eval_order(np.arange(rows), data.num_examples))


def calibration_batch(config: ExperimentConfig, source: Path | int) -> Batch:
    """Return what routers and groupings are fitted on.

    `source` is a text file, read up to `CALIBRATION_TOKENS` tokens, or a number of
    tokens of the run's own training data.

    Raises ConfigError for a number below one, DataError if the file can't be read, is
    too short or the run isn't one on text.
    """
    data = make_dataset(config, "train")
    if isinstance(source, int):
        if source < 1:
            raise ConfigError(f"--calibrate is {source}; it takes a text or tokens")
        return probe_batch(data, source)
    if config.model.kind == "vision":
        raise DataError(f"{source} is a text but the run is on images; give tokens")
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"--calibrate {source} can't be read ({reason}); give a text file in "
            "UTF-8, or a number of tokens"
        ) from None
    ids = data.encode(text)[:CALIBRATION_TOKENS].astype(np.int32)
    length = min(config.seq_len, len(ids))
    rows = len(ids) // max(length, 1)
    if not rows:
        raise DataError(f"--calibrate {source} holds no text; give a longer one")
    tokens = ids[: rows * length].reshape(rows, length)
    return {"tokens": tokens, "segments": np.ones_like(tokens)}


def count_scored(batch: Batch) -> int:
    """Return how many of a batch's targets or labels count."""
    scored = batch["mask"] > 0 if "mask" in batch else batch["labels"] >= 0
    return int(scored.sum())
