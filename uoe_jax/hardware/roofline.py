"""Step time, memory and what bounds them, predicted from a config. Imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from uoe_jax.config import ExperimentConfig, OptimConfig
from uoe_jax.hardware.comms import RingStep, place_axes, seconds
from uoe_jax.hardware.count import (
    DTYPE_BYTES,
    count_params,
    flops_per_token,
    head_numbers,
    model_layers,
    num_tokens,
)
from uoe_jax.hardware.devices import Device, Topology
from uoe_jax.hardware.gemm import GemmModel
from uoe_jax.hardware.step_products import (
    moved_bytes,
    product_seconds,
    score_factors,
)
from uoe_jax.hardware.work import (
    FLOP_KINDS,
    Collective,
    collectives,
    device_work,
    held_params,
    tokens_per_device,
    whole_params,
)
from uoe_jax.kinds import MLPS

_FLOAT32 = 4.0  # bytes
# Gathers and gradient sums can run beside this share of the arithmetic.
_OVERLAP = 0.8


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How much longer each kind of work takes than at the data sheet's rate.

    `step_seconds` is added once a step. Factors not given are `DEFAULT_FACTORS`. With
    `learned` those of products are of the seconds that a model of products predicts.
    Collectives take `links` times as long as at the data sheet's bandwidth; of those
    that run beside other work, `beside` times that are waited for at least.
    """

    device: str
    factors: Mapping[str, float]
    step_seconds: float = 0.0
    source: str = "typical shares of the peak, not measured"
    learned: bool = False
    links: float = 1.0
    beside: float = 0.0


DEFAULT_FACTORS = {
    "products": 1.5,
    "routed products": 4.0,
    "scores": 2.5,
    "routed scores": 8.0,
    "output": 1.6,
    "elementwise": 1.4,
    "optimizer": 1.3,
}
UNCALIBRATED = Calibration(device="any", factors=DEFAULT_FACTORS)
# Of products whose seconds a model predicts one by one.
LEARNED_FACTORS = {
    "products": 1.0,
    "routed products": 1.0,
    "scores": 1.0,
    "routed scores": 1.0,
    "output": 1.0,
    "elementwise": 1.2,
    "optimizer": 1.7,
}
LEARNED = Calibration(
    device="any",
    factors=LEARNED_FACTORS,
    source="typical shares of the peak; products by their own shapes",
    learned=True,
)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One layout's step: seconds by kind of work, bytes by kind, and the verdict."""

    sizes: dict[str, int]
    work_seconds: dict[str, float]
    collectives: tuple[tuple[Collective, float], ...]  # with the seconds of all of them
    exposed_seconds: float  # of collectives that nothing hides
    step_seconds: float
    memory: dict[str, float]  # bytes on one chip
    memory_limit: float
    tokens: int
    flops: float
    peak_flops: float

    @property
    def memory_bytes(self) -> float:
        """Predicted bytes on one chip."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a chip's memory holds the layout."""
        return self.memory_bytes <= self.memory_limit

    @property
    def shortfall(self) -> float:
        """Bytes missing on each chip; 0 where it fits."""
        return max(0.0, self.memory_bytes - self.memory_limit)

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of all chips."""
        return self.tokens / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation of all chips."""
        return self.flops / self.step_seconds / self.peak_flops

    @property
    def bound(self) -> str:
        """What takes most of the step: arithmetic, memory or a collective."""
        arithmetic = sum(self.work_seconds[kind] for kind in FLOP_KINDS)
        memory = sum(self.work_seconds.values()) - arithmetic
        if self.exposed_seconds > max(arithmetic, memory):
            worst = max(self.collectives, key=lambda pair: pair[1])[0]
            return f"{worst.kind} over {worst.axis}"
        return "arithmetic" if arithmetic >= memory else "memory"


def predict(
    config: ExperimentConfig,
    sizes: Mapping[str, int],
    topology: Topology,
    calibration: Calibration = UNCALIBRATED,
    gemm: GemmModel | None = None,
    rings: Mapping[str, RingStep] | None = None,
) -> Prediction:
    """Return the predicted step of a layout on a topology.

    A `learned` calibration takes the products' seconds from `gemm`. `rings` says of
    axes how far the next device of a ring is, one link if not given.

    Each kind of work takes its FLOPs or bytes at the data sheet's rate, times the
    calibration's factor. Hidden collectives cost what exceeds a share of the
    arithmetic, the others their whole time.
    """
    device = topology.device
    work = device_work(config, sizes)
    spent = {}
    for kind, amount in work.items():
        rate = device.bf16_flops if kind in FLOP_KINDS else device.memory_bandwidth
        if kind in FLOP_KINDS and config.model.compute_dtype == "float32":
            rate /= 2  # at best: TPUs and tensor cores take passes of bfloat16
        factor = calibration.factors.get(kind, DEFAULT_FACTORS[kind])
        spent[kind] = amount / rate * factor
    if gemm is not None and calibration.learned:
        spent |= _learned(config, sizes, topology.device, calibration, spent, gemm)
    groups = place_axes(topology, sizes)
    for axis, step in (rings or {}).items():
        groups[axis] = dataclasses.replace(groups[axis], step=step)
    slower = calibration.links
    talk = tuple(
        (c, slower * c.count * seconds(c.kind, c.num_bytes, groups[c.axis]))
        for c in collectives(config, sizes, chosen=topology.is_tpu)
    )
    hidden = sum(time for c, time in talk if c.hidden)
    exposed = sum(time for c, time in talk if not c.hidden)
    room = _OVERLAP * sum(spent[kind] for kind in FLOP_KINDS)
    exposed += max(calibration.beside * hidden / slower, hidden - room)
    tokens = config.data.batch_size * num_tokens(config.model, config.seq_len)
    chips = 1
    for size in sizes.values():
        chips *= size
    flops = flops_per_token(config.model, config.seq_len).training * tokens
    return Prediction(
        sizes=dict(sizes),
        work_seconds=spent,
        collectives=talk,
        exposed_seconds=exposed,
        step_seconds=sum(spent.values()) + exposed + calibration.step_seconds,
        memory=memory_bytes(config, sizes),
        memory_limit=device.memory_bytes,
        tokens=tokens,
        flops=flops,
        peak_flops=device.bf16_flops * chips,
    )


def _learned(
    config: ExperimentConfig,
    sizes: Mapping[str, int],
    device: Device,
    calibration: Calibration,
    spent: Mapping[str, float],
    gemm: GemmModel,
) -> dict[str, float]:
    """Return the kinds of work that are predicted by shape, if they can be."""
    found = product_seconds(config, sizes, gemm)
    if found is None:
        return {}
    factor = lambda kind: calibration.factors.get(kind, LEARNED_FACTORS[kind])
    found = {kind: time * factor(kind) for kind, time in found.items()}
    for kind, slower in score_factors(config).items():
        found[kind] = spent[kind] * slower
    moved = moved_bytes(config, sizes) / device.memory_bandwidth
    found["elementwise"] = moved * factor("elementwise")
    return found


def memory_bytes(
    config: ExperimentConfig, sizes: Mapping[str, int]
) -> dict[str, float]:
    """Return the bytes of one chip at the peak of a step, by what takes them.

    Parameters; moments, gradients and the mean of the weights in float32; what the
    backward pass needs; weights gathered for one layer; the output layer's chunk and
    gathered weights.
    """
    model = config.model
    rules = config.layout.rules
    parts = held_params(model, sizes, rules)
    held = sum(parts.values())
    found = {
        "parameters": held * DTYPE_BYTES[model.param_dtype],
        "optimizer": moments(config.optim, parts) * _FLOAT32,
        "gradients": held * _FLOAT32,
        "activations": _activations(config, sizes),
        "gathered weights": 0.0,
        "output layer": 0.0,
    }
    params = count_params(model)
    size = DTYPE_BYTES[model.compute_dtype]
    if sizes["fsdp"] > 1:
        whole = whole_params(model, rules)
        split = sum(params[p] - whole.get(p, 0) for p in ("attention", "mlp"))
        layer = split / model.num_layers
        # Two layers' weights: one worked on, the next one on its way; and a gradient.
        found["gathered weights"] = 3 * layer / sizes["tensor"] * size
    if model.kind == "decoder":
        outer = model.vocab_size * model.d_model
        tokens = tokens_per_device(config, sizes) / config.train.accumulate
        chunk = min(config.train.loss_chunk, tokens / sizes["tensor"])
        found["output layer"] = chunk * model.vocab_size * (size + 2 * _FLOAT32)
        found["output layer"] += outer * (_FLOAT32 + size)
    return found


def moments(optim: OptimConfig, parts: Mapping[str, float]) -> float:
    """Return how many numbers an optimizer keeps of parameters, counted by part.

    AdamW two each, Muon one of each matrix; the weights' mean is one more.
    """
    held = sum(parts.values())
    matrices = parts.get("attention", 0) + parts.get("mlp", 0)
    fewer = matrices if optim.kind == "muon" else 0
    return 2 * held - fewer + (held if optim.ema_decay > 0 else 0)


def _activations(config: ExperimentConfig, sizes: Mapping[str, int]) -> float:
    """Return the bytes kept for the backward pass, and one layer's working set."""
    model, tensor = config.model, sizes["tensor"]
    size = DTYPE_BYTES[model.compute_dtype]
    tokens = tokens_per_device(config, sizes) / config.train.accumulate
    scattered = config.layout.scatters
    held = model.d_model / (tensor if scattered else 1)
    widths = [
        _layer_width(layer.own, (layer.attention, layer.mlp), tensor)
        for layer in model_layers(model)
    ]
    if model.recompute == "full":
        kept, working = model.num_layers * held, max(widths)
    else:
        kept, working = sum(widths) + 4 * held * model.num_layers, 0.0
    return (kept + 2 * working) * tokens * size


def _layer_width(model: Any, kinds: tuple[str, str], tensor: int) -> float:
    """Return the numbers a token keeps in the split parts of a layer."""
    attention, mlp = kinds
    heads = model.num_heads + model.num_kv_heads
    heads *= model.key_dim + model.value_dim
    matrices = 3 if model.gated else 2
    if attention == "union":
        union = model.union_for("attention")
        heads *= _room(union.top_k, union.num_experts, tensor) / union.num_experts
    else:
        heads /= tensor
    heads += sum(map(head_numbers, model.beside.values())) / tensor
    heads += model.d_model * (model.convolution > 0)
    router = MLPS[mlp].router(model)
    experts, width = MLPS[mlp].sizes(model)
    if router is None:
        return heads + matrices * experts * width / tensor
    return heads + matrices * width * _room(router.top_k, experts, tensor)


def _room(top_k: int, num_experts: int, tensor: int) -> int:
    """Return the rows a token has room for on one device: all it could pick there."""
    return min(top_k, num_experts // tensor)
