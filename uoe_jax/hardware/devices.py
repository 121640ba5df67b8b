"""What accelerators offer, from their makers' data sheets. Imports no jax."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from uoe_jax.errors import ConfigError, nearest, shown
from uoe_jax.hardware.slices import (
    FAMILIES,
    check_slice,
    family_name,
    shape_of_type,
    spell,
)


@dataclass(frozen=True, kw_only=True)
class Link:
    """How chips of a kind are joined; rates are one way, in bytes/s of one chip.

    torus: `bandwidth` of one link, two of them in each of `dimensions`. switch: what a
    chip sends into a switch that joins `domain` chips. Beyond, all use `network`.
    """

    kind: Literal["torus", "switch"]
    bandwidth: float
    network: float
    source: str
    dimensions: int = 1
    domain: int = 8
    latency: float = 1e-6  # seconds of one hop


@dataclass(frozen=True, kw_only=True)
class Device:
    """One chip: dense bf16 rate (FLOP/s), memory (bytes), bandwidth (bytes/s)."""

    name: str
    bf16_flops: float
    memory_bytes: float
    memory_bandwidth: float
    source: str
    link: Link


_NVIDIA = "NVIDIA data sheet, dense rate"
_GOOGLE = "Google Cloud TPU system architecture pages"
_SCALING = "Austin et al. 2025, How to Scale Your Model, chapter 2"


def _torus(gbs: float, dimensions: int, network_gbs: float) -> Link:
    return Link(
        kind="torus",
        bandwidth=gbs * 1e9,
        network=network_gbs * 1e9,
        dimensions=dimensions,
        source=_SCALING,
    )


def _switch(gbs: float, network_gbs: float, source: str) -> Link:
    return Link(
        kind="switch",
        bandwidth=gbs * 1e9,
        network=network_gbs * 1e9,
        latency=5e-6,
        source=source,
    )


# NVLink: half of the two-way figure. Network: one ConnectX port a GPU in a DGX.
_NVLINK4 = _switch(450.0, 50.0, "NVIDIA H100 data sheet: NVLink 900 GB/s both ways")
_NVLINK5 = _switch(900.0, 50.0, "NVIDIA DGX B200 data sheet: NVLink 1.8 TB/s both ways")
_NVLINK3 = _switch(300.0, 25.0, "NVIDIA A100 data sheet: NVLink 600 GB/s both ways")
_PCIE5 = _switch(64.0, 12.5, "PCI Express 5.0 x16, one way; 100 Gb/s Ethernet")
_PCIE4 = _switch(32.0, 12.5, "PCI Express 4.0 x16, one way; 100 Gb/s Ethernet")
_PCIE3 = _switch(16.0, 12.5, "PCI Express 3.0 x16, one way; 100 Gb/s Ethernet")
_V4, _V5P = _torus(45.0, 3, 6.25), _torus(90.0, 3, 6.25)
_V7X = _torus(50.0, 3, 6.25)  # half of a chip's links
_V5E, _V6E = _torus(45.0, 2, 3.125), _torus(90.0, 2, 12.5)

# Order matters: the first name whose words all occur in a device kind wins.
DEVICES: tuple[Device, ...] = tuple(
    Device(
        name=name,
        bf16_flops=tflops * 1e12,
        memory_bytes=gigabytes * 1e9,
        memory_bandwidth=gbs * 1e9,
        source=source,
        link=link,
    )
    for name, tflops, gigabytes, gbs, link, source in (
        ("H200", 989.4, 141, 4800, _NVLINK4, _NVIDIA),
        ("H100 PCIe", 756.5, 80, 2000, _PCIE5, _NVIDIA),
        ("H100", 989.4, 80, 3350, _NVLINK4, _NVIDIA),
        ("B200", 2250, 180, 8000, _NVLINK5, _NVIDIA),
        ("A100 40GB", 312, 40, 1555, _NVLINK3, _NVIDIA),
        ("A100", 312, 80, 2039, _NVLINK3, _NVIDIA),
        ("L40S", 362, 48, 864, _PCIE4, _NVIDIA),
        ("L4", 121, 24, 300, _PCIE4, _NVIDIA),
        ("A10", 125, 24, 600, _PCIE4, _NVIDIA),
        ("T4", 65, 16, 300, _PCIE3, _NVIDIA + " (float16: no bfloat16 units)"),
        ("RTX 4090", 165.2, 24, 1008, _PCIE4, _NVIDIA),
        ("TPU v4", 275, 32, 1228, _V4, _GOOGLE),
        ("TPU v5 lite", 197, 16, 819, _V5E, _GOOGLE),
        ("TPU v5e", 197, 16, 819, _V5E, _GOOGLE),
        ("TPU v5p", 459, 95, 2765, _V5P, _GOOGLE),
        ("TPU v5", 459, 95, 2765, _V5P, _GOOGLE),
        ("TPU v6 lite", 918, 32, 1640, _V6E, _GOOGLE),
        ("TPU v6e", 918, 32, 1640, _V6E, _GOOGLE),
        # Of one of a chip's two cores, which are devices of their own to jax.
        ("TPU7x", 1153.5, 96, 3690, _V7X, _GOOGLE),
    )
)

# Eight simulated devices share one host; nominal figures, only their order is meant.
CPU = Device(
    name="cpu",
    bf16_flops=5e10,
    memory_bytes=4e9,
    memory_bandwidth=1e10,
    source="nominal",
    link=_switch(4.0, 1.0, "nominal"),
)


def find_device(kind: str) -> Device | None:
    """Return the chip whose name's words occur in jax's `device_kind`, or None."""
    lowered = kind.lower()
    for device in DEVICES:
        if all(word in lowered for word in device.name.lower().split()):
            return device
    return None


def peak_flops(kind: str) -> float | None:
    """Return a chip's dense bf16 rate in FLOP/s, or None for an unknown chip or CPU."""
    device = find_device(kind)
    return device.bf16_flops if device else None


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices of one kind; `shape` has several numbers where they form a torus.

    The two cores of a TPU7x chip are a first dimension of 2.
    """

    name: str
    device: Device
    shape: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        """Return how many devices there are."""
        return math.prod(self.shape)

    @property
    def is_tpu(self) -> bool:
        """Whether the TPU compiler knows this topology."""
        return self.device.name.startswith("TPU")


# Memory sizes and makers that stand in names of clouds and of drivers.
_GPU_ALIASES = {
    "a100-80gb": "a100",
    "a100-sxm": "a100",
    "h100-80gb": "h100",
    "h100-mega-80gb": "h100",
    "h100-sxm": "h100",
    "h200-141gb": "h200",
    "h200-sxm": "h200",
}
_MOST = 32_768  # devices of a switched topology


def _switched_names() -> dict[str, Device]:
    """Return GPUs and the CPU by their short names."""
    names = {"cpu": CPU}
    for device in DEVICES:
        if device.link.kind == "switch":
            names[device.name.lower().replace(" ", "-")] = device
    return names


def parse_topology(text: str) -> Topology:
    """Return the topology a name such as "v5p:4x4x4", "v5p-128" or "h200:8" stands for.

    Names of Google's accelerator types count TensorCores or chips as Google does.

    Raises:
      ConfigError: an unknown chip, or a slice that doesn't exist.
    """
    lowered = text.lower().strip()
    if found := shape_of_type(lowered):
        return _slice(*found)
    kind, colon, shape_text = lowered.partition(":")
    switched = _switched_names()
    gpu = re.sub(r"^(nvidia-)?(tesla-)?", "", kind.replace(" ", "-").replace("_", "-"))
    gpu, tpu = _GPU_ALIASES.get(gpu, gpu), family_name(kind)
    if gpu not in switched and tpu not in FAMILIES:
        known = [*switched, *FAMILIES]
        raise ConfigError(f"topology is {shown(text)}; {nearest(kind, known)}")
    parts = shape_text.split("x")
    # Python's isdigit takes superscripts; long numbers aren't chips.
    if not colon or not all(re.fullmatch(r"0*[1-9][0-9]{0,8}", p) for p in parts):
        example = f"{gpu}:8" if gpu in switched else _example(tpu)
        raise ConfigError(
            f"topology is {shown(text)}; write chips as KIND:COUNT or KIND:AxBxC, such "
            f"as {example}"
        )
    shape = tuple(int(part) for part in parts)
    dimensions = 1 if gpu in switched else FAMILIES[tpu].dimensions
    if len(shape) != dimensions:
        example = f"{gpu}:{math.prod(shape)}" if gpu in switched else _example(tpu)
        raise ConfigError(
            f"topology is {shown(text)}; {gpu if gpu in switched else tpu} chips form "
            f"{dimensions} dimension{'s' * (dimensions > 1)}, write {example}"
        )
    if gpu in switched:
        if shape[0] > _MOST:
            raise ConfigError(f"topology is {shown(text)}; use at most {_MOST} devices")
        return Topology(name=f"{gpu}:{shape[0]}", device=switched[gpu], shape=shape)
    check_slice(tpu, shape)
    return _slice(tpu, shape)


def _example(tpu: str) -> str:
    return f"{tpu}:{spell((4,) * FAMILIES[tpu].dimensions)}"


def _slice(name: str, shape: tuple[int, ...]) -> Topology:
    title = "TPU7x" if name == "tpu7x" else f"TPU {name}"
    device = next(device for device in DEVICES if device.name == title)
    cores = (2,) if name == "tpu7x" else ()
    return Topology(name=f"{name}:{spell(shape)}", device=device, shape=cores + shape)
