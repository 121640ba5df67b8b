"""The part of `uoe cost` about decoding: one token on a device, others beside it."""

from __future__ import annotations

import dataclasses

from uoe_jax.config import ModelConfig
from uoe_jax.errors import ConfigError, nearest, shown
from uoe_jax.hardware import pim
from uoe_jax.hardware.decoding import DecodeCost, roofline_decode, short_names
from uoe_jax.report.table import format_table

# What a memory device is set beside, where the model fits.
BESIDE = ("h200", "t4")


def decode_costs(model: ModelConfig, device: str, context: int | None) -> list[dict]:
    """Return what a decoded token costs on a device, first, and on others.

    `context` is the model's longest without one.

    Raises:
      ConfigError: an unknown device, or a model or context that it can't serve.
    """
    context = model.max_seq_len if context is None else context
    first = _cost(model, device, context)
    found = [first]
    for name in BESIDE:
        if name != first.device:
            try:
                found.append(roofline_decode(model, context, name))
            except ConfigError:  # doesn't fit there
                continue
    return [dataclasses.asdict(cost) for cost in found]


def _cost(model: ModelConfig, device: str, context: int) -> DecodeCost:
    name = device.strip().lower()
    kind = name.partition(":")[0]
    if kind in pim.SPECS:
        return pim.decode_cost(model, context, pim.find_spec(name))
    known = [*pim.SPECS, *short_names()]
    if name not in known:
        raise ConfigError(f"--device is {shown(device)}; {nearest(kind, known)}")
    return roofline_decode(model, context, name)


def describe(costs: list[dict]) -> str:
    """Return the costs as tables: devices side by side, then the first one's phases."""
    first = costs[0]
    rows = [
        (
            cost["device"],
            f"{cost['seconds'] * 1e3:.4g}",
            "-" if cost["joules"] is None else f"{cost['joules'] * 1e3:.4g}",
            f"{1 / cost['seconds']:,.0f}",
            "-" if cost["row_hits"] is None else f"{100 * cost['row_hits']:.1f}%",
            f"{cost['bytes_held'] / 1e9:.3g} of {cost['capacity'] / 1e9:.4g} GB",
        )
        for cost in costs
    ]
    header = (
        *("decoding, batch 1", "ms a token", "mJ a token", "tokens/s"),
        *("row hits", "memory"),
    )
    phases = [
        (name, f"{seconds * 1e3:.4g}", f"{100 * seconds / first['seconds']:.1f}%")
        for name, seconds in first["phases"].items()
    ]
    sources = {cost["source"]: cost["device"] for cost in reversed(costs)}
    notes = [f"{device}: {source}" for source, device in reversed(sources.items())]
    return "\n\n".join(
        [
            format_table(header, rows),
            f"{first['context']} tokens in the cache. " + "; ".join(notes) + ".",
            format_table((f"a token on {first['device']}", "ms", "share"), phases),
        ]
    )
