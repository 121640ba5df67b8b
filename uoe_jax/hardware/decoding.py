"""What one decoded token costs on an ordinary device: its bytes at the memory's rate.

At batch 1 every weight that a token uses is read once for it, and so are the keys and
values that it sees. Nothing can be faster; launches and small reads make it slower.
Imports no jax.
"""

from __future__ import annotations

from dataclasses import dataclass

from uoe_jax.config import ModelConfig
from uoe_jax.errors import ConfigError, nearest, shown
from uoe_jax.hardware.count import cache_bytes, count_active_params, count_params
from uoe_jax.hardware.devices import DEVICES, Device

_BF16 = 2  # bytes of a weight, key or value
# Board power in watts, of the makers' data sheets: what a token can take at most.
BOARD_WATTS = {"H200": 700.0, "H100": 700.0, "A100": 400.0, "L4": 72.0, "T4": 70.0}


@dataclass(frozen=True, kw_only=True)
class DecodeCost:
    """What one token costs at one context; times in seconds, energy in joules."""

    device: str
    source: str  # where the numbers come from
    context: int
    seconds: float
    joules: float | None
    row_hits: float | None  # share of the columns that were read from an open row
    phases: dict[str, float]  # seconds by what is done
    bytes_held: int  # weights, and keys and values at the model's longest context
    capacity: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens of one sequence a second."""
        return 1 / self.seconds


def short_names() -> dict[str, Device]:
    """Return devices by the names that commands take, such as h200 and tpu-v5e."""
    return {device.name.lower().replace(" ", "-"): device for device in DEVICES}


def roofline_decode(model: ModelConfig, context: int, name: str) -> DecodeCost:
    """Return what a token costs at a device's memory bandwidth, batch 1, bfloat16.

    Routed attention is counted by what is in its cache: its experts' share of it.

    Raises:
      ConfigError: an unknown device, a model that isn't a decoder or doesn't fit, or a
        context that is too long.
    """
    check_context(model, context)
    devices = short_names()
    if name not in devices:
        raise ConfigError(f"device is {shown(name)}; {nearest(name, devices)}")
    device = devices[name]
    held = held_bytes(model)
    if held > device.memory_bytes:
        raise ConfigError(
            f"{name} holds {device.memory_bytes / 1e9:.0f} GB and the model needs "
            f"{held / 1e9:.2f} GB at {model.max_seq_len} tokens; use a larger device"
        )
    # Of the embedding one row is read; a head of its own is read whole.
    weights = count_active_params(model) * _BF16
    if not model.tie_embeddings:
        weights -= model.vocab_size * model.d_model * _BF16
    rate = device.memory_bandwidth
    phases = {
        "weights": weights / rate,
        "keys and values": cache_bytes(model, 1, context, "bfloat16") / rate,
    }
    seconds = sum(phases.values())
    watts = BOARD_WATTS.get(device.name)
    return DecodeCost(
        device=name,
        source="bytes at the data sheet's bandwidth, energy at the board's power",
        context=context,
        seconds=seconds,
        joules=None if watts is None else watts * seconds,
        row_hits=None,
        phases=phases,
        bytes_held=held,
        capacity=device.memory_bytes,
    )


def held_bytes(model: ModelConfig) -> int:
    """Return the bytes of weights in bfloat16, and of the longest context's cache."""
    weights = sum(count_params(model).values()) * _BF16
    return weights + cache_bytes(model, 1, model.max_seq_len, "bfloat16")


def check_context(model: ModelConfig, context: int) -> None:
    """Raise ConfigError if a model can't decode a token after `context` others."""
    if model.kind != "decoder":
        raise ConfigError(
            f"model.kind is {shown(model.kind)}; only a decoder makes tokens one by one"
        )
    if not 1 <= context <= model.max_seq_len:
        raise ConfigError(
            f"context is {shown(context)}; the model takes 1 to {model.max_seq_len} "
            "tokens"
        )
