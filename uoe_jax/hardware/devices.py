"""What accelerators offer, from their makers' data sheets. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Device:
    """One chip: dense bf16 rate (FLOP/s), memory (bytes), bandwidth (bytes/s)."""

    name: str
    bf16_flops: float
    memory_bytes: float
    memory_bandwidth: float
    source: str


_NVIDIA = "NVIDIA data sheet, dense rate"
_GOOGLE = "Google Cloud TPU system architecture pages"

# Order matters: the first name found in a device kind wins.
DEVICES: tuple[Device, ...] = tuple(
    Device(
        name=name,
        bf16_flops=tflops * 1e12,
        memory_bytes=gigabytes * 1e9,
        memory_bandwidth=gbs * 1e9,
        source=source,
    )
    for name, tflops, gigabytes, gbs, source in (
        ("H200", 989.4, 141, 4800, _NVIDIA),
        ("H100 PCIe", 756.5, 80, 2000, _NVIDIA),
        ("H100", 989.4, 80, 3350, _NVIDIA),
        ("B200", 2250, 180, 8000, _NVIDIA),
        ("A100", 312, 80, 2039, _NVIDIA),
        ("L40S", 362, 48, 864, _NVIDIA),
        ("L4", 121, 24, 300, _NVIDIA),
        ("A10", 125, 24, 600, _NVIDIA),
        ("T4", 65, 16, 300, _NVIDIA + " (float16: no bfloat16 units)"),
        ("RTX 4090", 165.2, 24, 1008, _NVIDIA),
        ("TPU v4", 275, 32, 1228, _GOOGLE),
        ("TPU v5 lite", 197, 16, 819, _GOOGLE),
        ("TPU v5e", 197, 16, 819, _GOOGLE),
        ("TPU v5p", 459, 95, 2765, _GOOGLE),
        ("TPU v5", 459, 95, 2765, _GOOGLE),
        ("TPU v6 lite", 918, 32, 1640, _GOOGLE),
        ("TPU v6e", 918, 32, 1640, _GOOGLE),
    )
)


def find_device(kind: str) -> Device | None:
    """Return the chip whose name occurs in jax's `device_kind`, or None."""
    lowered = kind.lower()
    for device in DEVICES:
        if device.name.lower() in lowered:
            return device
    return None


def peak_flops(kind: str) -> float | None:
    """Return a chip's dense bf16 rate in FLOP/s, or None for an unknown chip or CPU."""
    device = find_device(kind)
    return device.bf16_flops if device else None
