"""What is computed again in the backward pass, chosen by a device's memory.

A config with `model.remat` auto leaves three things open: what is recomputed, whether
layers are scanned, and in how many parts a batch is taken. The model is the same up to
rounding; but with dropout a part has its own draws, and routers are balanced over
each part. Imports no jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from uoe_jax.config import ExperimentConfig
from uoe_jax.hardware.count import num_tokens
from uoe_jax.hardware.roofline import memory_bytes

# Of a device's memory, what a step may be predicted to take: predictions of steps
# without recomputation were up to 7% too low.
SHARE = 0.9
REMATS = ("none", "full", "dots", "auto")
# Tokens of a device in one part of a batch: kernels are slower with fewer.
LEAST_TOKENS = 16_384


def settle_recompute(
    config: ExperimentConfig, sizes: Mapping[str, int], memory: float | None
) -> tuple[ExperimentConfig, str | None]:
    """Return a config without auto, and why it is so as one line; None if it had none.

    Nothing is recomputed, and layers are compiled one by one, where that fits: with
    the batch in as few parts as it takes. Else all is, and layers are scanned as the
    config says, as where memory isn't known.

    Args:
      config: of the run.
      sizes: devices by axis.
      memory: bytes that one device has; None: unknown.
    """
    if config.model.remat != "auto":
        return config, None
    full = _with(config, remat="full")
    if memory is None:
        return full, (
            "remat auto: full, all activations computed again, as the memory of this "
            "device isn't known"
        )
    allowed, least = SHARE * memory, None
    for parts in _parts(config, sizes):
        found = _with(config, parts, remat="none", scan_layers=False)
        need = peak_bytes(found, sizes)
        if need <= allowed:
            split = "" if parts == 1 else f"; a batch in {parts} parts"
            return found, (
                "remat auto: none, layers compiled one by one"
                f"{split}: about {_gigabytes(need)} of {_gigabytes(memory)} predicted"
            )
        least = need if least is None else min(least, need)
    assert least is not None  # a batch has one part at least
    return full, (
        "remat auto: full, all activations computed again: without, about "
        f"{_gigabytes(least)} predicted, more than {SHARE:.0%} of {_gigabytes(memory)}"
    )


def peak_bytes(config: ExperimentConfig, sizes: Mapping[str, int]) -> float:
    """Return the bytes of a step; a batch in parts has a sum of gradients beside."""
    found = memory_bytes(config, sizes)
    sums = found["gradients"] if config.train.accumulate > 1 else 0.0
    return sum(found.values()) + sums


def _parts(config: ExperimentConfig, sizes: Mapping[str, int]) -> Iterator[int]:
    """Yield into how many parts a batch may go, the fewest first."""
    given, batch = config.train.accumulate, config.data.batch_size
    rows = batch // (sizes["data"] * sizes["fsdp"])
    length = num_tokens(config.model, config.seq_len) // sizes["sequence"]
    for parts in range(given, rows + 1, given):
        enough = rows // parts * length >= LEAST_TOKENS
        if rows % parts == 0 and (enough or parts == given):
            yield parts
    if given > rows:
        yield given


def adopt_recompute(
    config: ExperimentConfig, before: ExperimentConfig
) -> ExperimentConfig:
    """Return a config with what auto settled in the run that it goes on with."""
    model, parts = before.model, before.train.accumulate
    if config.model.remat != "auto" or parts % config.train.accumulate:
        return config
    scans = config.model.scan_layers and model.scan_layers
    return _with(config, parts, remat=model.remat, scan_layers=scans)


def open_settings(config: ExperimentConfig) -> tuple[int, int, int]:
    """Return what auto settles as numbers, that processes can compare."""
    model = config.model
    return REMATS.index(model.remat), model.scan_layers, config.train.accumulate


def with_settings(
    config: ExperimentConfig, remat: int, scans: int, parts: int
) -> ExperimentConfig:
    """Return a config with what another's `open_settings` are."""
    return _with(config, parts, remat=REMATS[remat], scan_layers=bool(scans))


def _with(
    config: ExperimentConfig, parts: int | None = None, **model: object
) -> ExperimentConfig:
    train = config.train
    if parts is not None:
        train = dataclasses.replace(train, accumulate=parts)
    changed = dataclasses.replace(config.model, **model)  # type: ignore[arg-type]
    return dataclasses.replace(config, model=changed, train=train)


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:,.3g} GB"
