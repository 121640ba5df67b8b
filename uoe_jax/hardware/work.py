"""What one device does in one training step of a layout. Imports no jax.

A step is split into kinds of work that run at different shares of the peak: plain and
routed products, their attention scores, the output layer, elementwise passes over
memory, the optimizer. Collectives are listed as the layout makes them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from uoe_jax.config import ExperimentConfig, ModelConfig
from uoe_jax.hardware.count import (
    DTYPE_BYTES,
    count_params,
    flops_per_token,
    group_title,
    head_numbers,
    model_layers,
    num_tokens,
)
from uoe_jax.kinds import ATTENTIONS, MLPS
from uoe_jax.rules import NO_RULES, Rules
from uoe_jax.splits import whole_weights

# Kinds of work; those of the first tuple are in FLOPs, of the second in bytes.
FLOP_KINDS = ("products", "routed products", "scores", "routed scores", "output")
BYTE_KINDS = ("elementwise", "optimizer")

_FLOAT32 = 4.0  # bytes
# How often products and everything else of a layer run: once forward, twice backward,
# and again in the backward pass where rematerialisation hasn't kept their results.
_PASSES = {"none": (3.0, 3.0), "dots": (3.0, 4.0), "full": (4.0, 4.0)}
# Numbers read and written for each logit: the product writes it, the maximum, the sum
# and the gradient read it, the gradient is written.
_LOGIT_PASSES = 5.0


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One kind of collective of a step: over an axis, `count` times `num_bytes`.

    Bytes are of the whole array, see `comms.seconds`. `hidden` says that it can run
    beside the work of other layers.
    """

    kind: str
    axis: str
    what: str
    num_bytes: float
    count: int
    hidden: bool


class LayerKind(NamedTuple):
    """What layers that cost the same have in common; `own` is the config of one."""

    own: ModelConfig
    attention: str
    mlp: str

    @property
    def alone(self) -> ModelConfig:
        """The config of a model of this one layer."""
        return dataclasses.replace(
            self.own,
            num_layers=1,
            attention=(self.attention,),  # type: ignore[arg-type]
            mlp=(self.mlp,),  # type: ignore[arg-type]
        )


@functools.lru_cache(256)
def layer_groups(model: ModelConfig) -> Mapping[LayerKind, int]:
    """Return how many layers there are of each kind and of the same widths."""
    return Counter(
        LayerKind(layer.own, layer.attention, layer.mlp)
        for layer in model_layers(model)
    )


def tokens_per_device(config: ExperimentConfig, sizes: Mapping[str, int]) -> float:
    """Return the tokens of one step that one device's data, fsdp and sequence hold."""
    length = num_tokens(config.model, config.seq_len)
    shares = sizes["data"] * sizes["fsdp"] * sizes["sequence"]
    return config.data.batch_size * length / shares


def device_work(config: ExperimentConfig, sizes: Mapping[str, int]) -> dict[str, float]:
    """Return FLOPs and bytes of one device in one step, by kind of work.

    A routed layer is counted at balanced load.
    """
    model, tokens = config.model, tokens_per_device(config, sizes)
    length = num_tokens(model, config.seq_len)
    again, passes = _PASSES[model.recompute]
    # A layer's last product gives its output, which its backward pass doesn't need.
    last = 1 / (3 if model.gated else 2) if again > 3 else 0.0
    split = tokens / sizes["tensor"]
    work: dict[str, float] = dict.fromkeys((*FLOP_KINDS, *BYTE_KINDS), 0.0)
    for group, layers in layer_groups(model).items():
        parts = flops_per_token(group.alone, length).parts
        for name, flops in parts.items():
            if name in ("head", "embedding"):
                continue
            routed = _gathers(group, name)
            kind = ("routed " if routed else "") + (
                "scores" if "scores" in name else "products"
            )
            share = tokens if name in ("routers", "convolution") else split
            times = passes if "scores" in name else again
            if kind == "scores":
                share *= _latest(config, sizes["sequence"], _window(group, name))
            times -= last if name == "mlp" else 0.0
            work[kind] += layers * flops * share * times
        size = DTYPE_BYTES[model.compute_dtype]
        reads = _elementwise(group, sizes)
        work["elementwise"] += layers * tokens * size * reads * passes
    head = flops_per_token(model, length).parts["head"]
    work["output"] = head * split * 3
    work["elementwise"] += loss_bytes(config, split)
    state = sum(held_params(model, sizes, config.layout.rules).values()) * _FLOAT32
    work["optimizer"] = 8.0 * state  # four arrays read, three written, one cast
    return work


def _latest(config: ExperimentConfig, sequence: int, window: int) -> float:
    """Return how many times the mean share of the scores the last device has.

    It holds the last tokens, which see the most keys, unless heads are shared out: of
    `s` devices, (2s - 1) / s. With a window no longer than a device's tokens all but
    the first see as much.
    """
    even = config.layout.sequence_attention == "heads" or not config.model.causal
    even |= 0 < window <= config.seq_len // sequence
    return 1.0 if even else 2 - 1 / sequence


def _window(group: LayerKind, part: str) -> int:
    """Return how many tokens the heads of a part see, 0 for all."""
    beside = group.own.beside
    own = next((beside[n] for n in beside if group_title(n) in part), group.own)
    return own.window[0]


def _gathers(group: LayerKind, part: str) -> bool:
    """Whether a part of a layer works on gathered rows, as its kinds say."""
    if "attention" in part:
        return ATTENTIONS[group.attention].gathers
    return part in ("mlp", "routers") and MLPS[group.mlp].router(group.own) is not None


def loss_bytes(config: ExperimentConfig, tokens: float) -> float:
    """Return the bytes of a decoder's logits, and of the gradient summed over chunks.

    Classifiers have one row of logits a sample: nothing.
    """
    model, train = config.model, config.train
    if model.kind != "decoder":
        return 0.0
    logits = (
        _LOGIT_PASSES * tokens * model.vocab_size * DTYPE_BYTES[model.compute_dtype]
    )
    chunks = tokens / min(train.loss_chunk, tokens / train.accumulate)
    return logits + chunks * 2 * _FLOAT32 * model.vocab_size * model.d_model


def _elementwise(group: LayerKind, sizes: Mapping[str, int]) -> float:
    """Return numbers read and written a token in a layer's passes over memory."""
    model, attention, mlp = group
    tensor = sizes["tensor"]
    keep = model.union.top_k / model.union.num_experts
    # Norms and residual sums: read and written by each of the two parts.
    total = 8.0 * model.d_model
    total += 2.0 * model.d_model * (model.convolution > 0)
    heads = model.num_heads + model.num_kv_heads
    heads *= model.key_dim + model.value_dim
    beside = sum(map(head_numbers, model.beside.values()))
    total += 2 * (heads * (keep if attention == "union" else 1) + beside) / tensor
    wide = MLPS[mlp].active_width(model)
    matrices = 3 if model.gated else 2
    total += 2 * wide * matrices / tensor
    if attention == "union":  # rows gathered and summed back
        total += 4 * model.d_model * model.union.top_k / tensor
    if router := MLPS[mlp].router(model):
        total += 4 * model.d_model * router.top_k / tensor
    if model.scan_layers and model.recompute != "full":
        # A scan copies what the backward pass needs into a stack of all layers.
        total += (2 * model.d_model + heads + beside + wide * matrices) / tensor
    return total


def whole_params(model: ModelConfig, rules: Rules) -> dict[str, int]:
    """Return how many parameters layout rules keep from being split over fsdp."""
    parts = {"embed": "embedding", "embed.position": "positions"}
    found: dict[str, int] = {}
    for name, param in whole_weights(model, rules).items():
        owner = name.rpartition(".")[0]
        part = parts.get(owner, owner.rpartition(".")[2])
        found[part] = found.get(part, 0) + math.prod(param.shape)
    return found


def held_params(
    model: ModelConfig, sizes: Mapping[str, int], rules: Rules = NO_RULES
) -> dict[str, float]:
    """Return the parameters one device keeps, by part."""
    params, whole = count_params(model), whole_params(model, rules)
    fsdp, tensor = sizes["fsdp"], sizes["tensor"]
    shares = {
        "attention": fsdp * tensor,
        "mlp": fsdp * tensor,
        "embedding": fsdp,
        "positions": fsdp,
        "head": fsdp,
    }
    return {
        name: (count + (fsdp - 1) * whole.get(name, 0)) / shares.get(name, 1)
        for name, count in params.items()
    }


def collectives(
    config: ExperimentConfig, sizes: Mapping[str, int], *, chosen: bool
) -> Iterator[Collective]:
    """Yield the collectives of one step.

    `chosen`: an all-to-all sends the tokens that go, as TPUs do, not all its room.
    """
    steps = config.train.accumulate
    yield from _weights(config, sizes, steps)
    for group, layers in layer_groups(config.model).items():
        yield from _tensor(config, sizes, group, layers * steps, chosen)
        yield from _sequence(config, sizes, group, layers * steps)
    yield from _gradients(config, sizes)


def _weights(
    config: ExperimentConfig, sizes: Mapping[str, int], steps: int
) -> Iterator[Collective]:
    """Weights of a layer are gathered for each pass and their gradients scattered."""
    model = config.model
    if sizes["fsdp"] == 1:
        return
    size = DTYPE_BYTES[model.compute_dtype]
    params = count_params(model)
    for part, number in whole_params(model, config.layout.rules).items():
        params[part] -= number
    layer = (params["attention"] + params["mlp"]) / model.num_layers / sizes["tensor"]
    count = model.num_layers * steps
    for kind, times in (("all_gather", 2), ("reduce_scatter", 1)):
        yield Collective(
            kind=kind,
            axis="fsdp",
            what="layer weights",
            num_bytes=layer * size,
            count=times * count,
            hidden=True,
        )
        outer = params["embedding"] + params.get("head", 0)
        yield Collective(
            kind=kind,
            axis="fsdp",
            what="embeddings",
            num_bytes=outer * _FLOAT32,
            count=steps,
            hidden=False,
        )


def _tensor(
    config: ExperimentConfig,
    sizes: Mapping[str, int],
    group: LayerKind,
    count: int,
    chosen: bool,
) -> Iterator[Collective]:
    model, layout = config.model, config.layout
    if sizes["tensor"] == 1:
        return
    size = DTYPE_BYTES[model.compute_dtype]
    tokens = tokens_per_device(config, sizes) / config.train.accumulate
    whole = tokens * model.d_model * size
    scattered = layout.scatters
    again = 1 if model.recompute == "full" else 0
    parts = 2
    routed = MLPS[group.mlp].router(model)
    if layout.dispatches and routed is not None:
        parts = 1
        visited: float = sizes["tensor"]
        if chosen:
            visited = visits(routed.top_k, routed.num_experts, sizes["tensor"])
        yield Collective(
            kind="all_to_all",
            axis="tensor",
            what="tokens to experts and back",
            num_bytes=whole * visited,
            count=count * (4 + again),
            hidden=False,
        )
        if not scattered:
            for kind in ("all_gather", "all_reduce"):
                yield Collective(
                    kind=kind,
                    axis="tensor",
                    what="MLP outputs",
                    num_bytes=whole,
                    count=count,
                    hidden=False,
                )
    names = ("all_gather", "reduce_scatter") if scattered else ("all_reduce",)
    for kind in names:
        # A layer's inputs are all made again; of the outputs only attention's.
        repeated = parts if kind == "all_gather" else 1
        yield Collective(
            kind=kind,
            axis="tensor",
            what="layer inputs and outputs",
            num_bytes=whole,
            count=count * (2 * parts + again * repeated),
            hidden=False,
        )


def visits(top_k: int, num_experts: int, devices: int) -> float:
    """Return the mean number of devices that hold a token's `top_k` experts, where all
    sets of experts are as likely."""
    local = num_experts // devices
    nowhere = math.comb(num_experts - local, top_k) / math.comb(num_experts, top_k)
    return devices * (1 - nowhere)


def _sequence(
    config: ExperimentConfig,
    sizes: Mapping[str, int],
    group: LayerKind,
    count: int,
) -> Iterator[Collective]:
    model, sequence = group.own, sizes["sequence"]
    if sequence == 1:
        return
    size = DTYPE_BYTES[model.compute_dtype]
    tokens = tokens_per_device(config, sizes) / config.train.accumulate * sequence
    again = 1 if model.recompute == "full" else 0
    if group.attention == "union":
        for kind in ("all_gather", "reduce_scatter"):
            yield Collective(
                kind=kind,
                axis="sequence",
                what="tokens to experts and back",
                num_bytes=tokens * model.d_model * size,
                count=count * (2 + again),
                hidden=False,
            )
    dense = [*model.beside.values(), *([] if group.attention == "union" else [model])]
    kept = sum(own.num_kv_heads * own.kernel_dim for own in dense)
    if not kept:
        return
    if config.layout.sequence_attention == "heads":
        asked = sum(own.num_heads * own.kernel_dim for own in dense)
        yield Collective(
            kind="all_to_all",
            axis="sequence",
            what="heads for tokens and back",
            num_bytes=2 * tokens * (asked + kept) * size / sizes["tensor"],
            count=count * (2 + again),
            hidden=False,
        )
        return
    keys = 2 * tokens * kept * size / sizes["tensor"]
    if config.layout.sequence_attention == "gather":
        for kind, times in (("all_gather", 1 + again), ("reduce_scatter", 1)):
            yield Collective(
                kind=kind,
                axis="sequence",
                what="keys and values",
                num_bytes=keys,
                count=count * times,
                hidden=False,
            )
        return
    yield Collective(
        kind="collective_permute",
        axis="sequence",
        what="keys and values",
        num_bytes=keys,
        count=count * (sequence - 1) * (2 + again),
        hidden=True,
    )


def _gradients(
    config: ExperimentConfig, sizes: Mapping[str, int]
) -> Iterator[Collective]:
    model = config.model
    rules = config.layout.rules
    held = sum(held_params(model, sizes, rules).values()) * _FLOAT32
    if sizes["fsdp"] > 1 and rules:
        whole = whole_params(model, rules)
        layers = (whole.get("attention", 0) + whole.get("mlp", 0)) / sizes["tensor"]
        outer = sum(n for part, n in whole.items() if part not in ("attention", "mlp"))
        yield Collective(
            kind="all_reduce",
            axis="fsdp",
            what="gradients of whole weights",
            num_bytes=(layers + outer) * _FLOAT32,
            count=1,
            hidden=True,
        )
    for axis in ("data", "sequence"):
        if sizes[axis] > 1:
            yield Collective(
                kind="all_reduce",
                axis=axis,
                what="gradients",
                num_bytes=held,
                count=1,
                hidden=axis == "data",
            )
    if sizes["tensor"] > 1:
        params = count_params(model)
        outer = params["embedding"] + params.get("head", 0)
        yield Collective(
            kind="all_reduce",
            axis="tensor",
            what="gradients of embeddings",
            num_bytes=outer * _FLOAT32,
            count=1,
            hidden=False,
        )
