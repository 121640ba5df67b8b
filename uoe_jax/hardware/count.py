"""Parameters, FLOPs and bytes of a model, counted from its config. Imports no jax.

One multiply-add is 2 FLOPs. Only products are counted (projections, attention scores
and their weighted sums, convolutions, MLPs, routers, head), causal attention by the
pairs it keeps. An expert that a token doesn't use isn't counted for that token: a saved
FLOP is counted once, as absent. Norms, softmax and elementwise work are left out, as
usual in model-FLOPs utilisation (MFU).
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from uoe_jax.config import RANKS, ModelConfig
from uoe_jax.kinds import ATTENTIONS, MLPS, router_columns
from uoe_jax.weights import GROUPS, model_params

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class FlopCount:
    """FLOPs of one token in a sequence of a given length."""

    parts: dict[str, float]  # forward FLOPs by part of the model

    @property
    def forward(self) -> float:
        """FLOPs of the forward pass, per token."""
        return sum(self.parts.values())

    @property
    def training(self) -> float:
        """FLOPs of forward and backward, per token; recomputation isn't counted."""
        return 3 * self.forward


def num_tokens(model: ModelConfig, seq_len: int | None = None) -> int:
    """Return the sequence length the model works on: patches for vision."""
    if model.kind == "vision":
        return model.num_image_tokens
    return seq_len or model.max_seq_len


def _mlp_matrices(model: ModelConfig) -> int:
    return 3 if model.gated else 2


@dataclass(frozen=True)
class _Attention:
    """Sizes of one attention kind, and the share of them that a token uses.

    `side` is the projections of queries and outputs, `keys` of keys and values.
    """

    side_params: int
    key_params: int
    side: float = 1.0
    keys: float = 1.0

    @property
    def params(self) -> int:
        return self.side_params + self.key_params

    @property
    def active(self) -> float:
        return self.side * self.side_params + self.keys * self.key_params


def _attention(model: ModelConfig, kind: str) -> _Attention:
    d, both = model.d_model, model.key_dim + model.value_dim
    heads, kv = model.num_heads, model.num_kv_heads
    side, keys = d * heads * both, d * kv * both
    if model.output_gate:
        side += d * heads
    if model.sink:
        side += heads
    if model.qkv_bias:
        side, keys = side + heads * model.key_dim, keys + kv * both
    if model.output_bias:
        side += d
    return _Attention(side, keys, *ATTENTIONS[kind].shares(model))


def _mlp_width(model: ModelConfig, kind: str) -> tuple[int, float]:
    """Return the neurons of an MLP kind and how many of them a token uses."""
    experts, width = MLPS[kind].sizes(model)
    return experts * width, MLPS[kind].active_width(model)


def _mlp_weights(model: ModelConfig, width: int | float) -> int | float:
    """Return the numbers in the matrices of an MLP of so many neurons."""
    d, total = model.d_model, 0
    for name in RANKS:
        if name != "w_gate" or model.gated:
            rank = model.rank(name)
            total += rank * (d + width) if rank else d * width
    return total


def _mlp_params(model: ModelConfig, kind: str) -> int:
    width, _ = _mlp_width(model, kind)
    biases = 0
    if model.has_mlp_bias:
        biases = (_mlp_matrices(model) - 1) * width + model.d_model
    return round(_mlp_weights(model, width)) + biases


def _scored(model: ModelConfig, attention: str, mlp: str) -> int:
    """Return how many scores the routers of a layer give a token."""
    kinds = (("attention", attention), ("mlp", mlp))
    named = [router_columns(model, part, kind) for part, kind in kinds]
    return sum(n for one in named for name, n in one.items() if name != "default")


class Layer(NamedTuple):
    """A layer's own config, the kinds of its parts, and the share of tokens inside."""

    own: ModelConfig
    attention: str
    mlp: str
    inside: float


@functools.lru_cache(256)
def model_layers(model: ModelConfig) -> tuple[Layer, ...]:
    """Return the layers of a model in order."""
    pairs = zip(model.layer_kinds, model.block_kinds, strict=True)
    return tuple(
        Layer(model.of_layer(n), *kinds, model.mod.keep if block == "mod" else 1.0)
        for n, (kinds, block) in enumerate(pairs)
    )


def count_params(model: ModelConfig) -> dict[str, int]:
    """Return trainable parameters by part; their sum is the model's size."""
    parts: Counter[str] = Counter()
    for name, param in model_params(model).items():
        parts[_part(name)] += math.prod(param.shape)
    return dict(parts)


def _part(name: str) -> str:
    """Return the part of a model that a parameter belongs to."""
    folders = name.split(".")[:-1]
    if folders[-1] == "router":
        return "routers"
    if folders[-1].endswith("norm"):
        return "norms"
    if folders[-1] == "position":
        return "positions"
    if folders[-1] in GROUPS:
        return "attention"
    return "embedding" if folders[-1] == "embed" else folders[-1]


def count_active_params(model: ModelConfig) -> int:
    """Return the parameters one token uses, embeddings and head included.

    Of a mixture-of-depths block the share of the tokens that enter it.
    """
    total = sum(count_params(model).values())
    for own, attention, mlp, inside in model_layers(model):
        part, width = _attention(own, attention), _mlp_width(own, mlp)
        total -= round(part.params - inside * part.active)
        total -= round(_mlp_params(own, mlp) * (1 - inside * width[1] / width[0]))
    return total


def _attention_flops(
    model: ModelConfig, kind: str, length: float, name: str = "attention"
) -> dict[str, float]:
    d, heads, both = model.d_model, model.num_heads, model.key_dim + model.value_dim
    part = _attention(model, kind)
    projected = part.side * heads + part.keys * model.num_kv_heads
    kinds = ATTENTIONS[kind]
    gates = part.side * heads if model.output_gate else 0.0
    parts = {
        f"{name} projections": 2.0 * d * (both * projected + gates),
        f"{name} scores": 2 * heads * both * kinds.keys_seen(model, length),
    }
    if chosen := kinds.choosing(model, length):
        parts["routers"] = chosen
    return parts


def group_title(name: str) -> str:
    """Return what a group of heads beside a layer's kind is called: "local heads"."""
    return name.replace("attention", "heads").replace("_", " ")


def flops_per_token(model: ModelConfig, seq_len: int | None = None) -> FlopCount:
    """Return one token's FLOPs in a sequence of `seq_len` tokens (or image patches).

    Routed attention is counted at balanced load: every routed expert in use sees the
    same share of a sample's tokens, all of them where samples select experts. A
    mixture-of-depths block is counted for the `keep` of the tokens that enter it, which
    see each other only.
    """
    length = num_tokens(model, seq_len)
    parts: dict[str, float] = defaultdict(float)
    for own, attention, mlp, inside in model_layers(model):
        layer = _attention_flops(own, attention, length * inside)
        for name, group in own.beside.items():
            title = group_title(name)
            layer |= _attention_flops(group, "dense", length * inside, title)
        if own.convolution:
            layer["convolution"] = 2.0 * own.convolution * own.d_model
        layer["mlp"] = 2 * _mlp_weights(own, _mlp_width(own, mlp)[1])
        columns = _scored(model, attention, mlp)
        layer["routers"] = layer.get("routers", 0.0) + 2.0 * model.d_model * columns
        for name, flops in layer.items():
            parts[name] += inside * flops
        if inside < 1:
            parts["routers"] += 2 * model.d_model
    parts["head"] = _head_flops(model, length)
    if model.kind == "vision":
        pixels = model.image_patch**2 * model.image_channels
        patches = (length - model.class_token) / length
        parts["embedding"] = 2.0 * pixels * model.d_model * patches
    return FlopCount(
        parts={name: n for name, n in parts.items() if n or name != "routers"}
    )


def _head_flops(model: ModelConfig, length: int) -> float:
    """Return the FLOPs after the blocks, per token."""
    d = model.d_model
    if model.kind == "decoder":
        return 2.0 * d * model.vocab_size
    pooler = 2 * d * d / length if model.pooling == "tanh" else 0.0
    if model.kind == "encoder" and model.encoder_head == "tokens":
        return pooler + 2.0 * d * (d + model.vocab_size)
    if model.kind == "encoder" and model.encoder_head == "none":
        return pooler
    return pooler + 2 * d * model.num_classes / length


def flop_share(model: ModelConfig, seq_len: int, lengths: Sequence[int]) -> float:
    """Return the FLOPs of sequences of these lengths, over those of whole rows.

    Of as many tokens in rows of `seq_len`: documents packed in a row don't see each
    other, so their attention costs less.
    """
    counts = Counter(int(length) for length in lengths if length > 0)
    if not counts:
        return 1.0
    tokens = sum(length * count for length, count in counts.items())
    spent = sum(
        length * count * _forward(model, length) for length, count in counts.items()
    )
    return spent / (tokens * _forward(model, seq_len))


@functools.lru_cache(1 << 16)
def _forward(model: ModelConfig, length: int) -> float:
    return flops_per_token(model, length).forward


def cache_bytes(
    model: ModelConfig, batch: int, length: int, dtype: str | None = None
) -> int:
    """Return the bytes of keys and values of `batch` sequences of `length` tokens.

    As they are allocated: narrow heads up to a multiple of 8, a mixture-of-depths block
    for every token, local heads for those of their window. With what convolutions keep.
    """
    size = DTYPE_BYTES[dtype or model.compute_dtype]
    token = sum(
        sum(own.cached_dims) * _logged(own, attention)
        for own, attention, _, _ in model_layers(model)
    )
    beside = sum(
        min(group.window[0] or length, length)
        * group.num_kv_heads
        * sum(group.cached_dims)
        for own, *_ in model_layers(model)
        for group in own.beside.values()
    )
    # The tokens that convolutions read next.
    beside += model.num_layers * max(model.convolution - 1, 0) * model.d_model
    return round(batch * size * (length * model.num_kv_heads * token + beside))


def _logged(model: ModelConfig, kind: str) -> float:
    """Return the share of a token's keys that a cache has room for."""
    share = _attention(model, kind).keys
    router = ATTENTIONS[kind].router(model)
    # A log has a place for every expert that a token may take.
    return share if router is None or share == 1 else share * router.most / router.top_k


def state_bytes(model: ModelConfig) -> dict[str, int]:
    """Return bytes of parameters, gradients and AdamW moments, by kind."""
    count = sum(count_params(model).values())
    size = count * DTYPE_BYTES[model.param_dtype]
    # Float32 whatever the parameters are.
    gradients = count * DTYPE_BYTES["float32"]
    return {"parameters": size, "gradients": gradients, "optimizer": 2 * gradients}


def head_numbers(model: ModelConfig) -> int:
    """Return the queries, keys and values of a token in all heads of a config."""
    return (model.num_heads + model.num_kv_heads) * (model.key_dim + model.value_dim)


def activation_bytes(model: ModelConfig, batch: int, seq_len: int | None = None) -> int:
    """Estimate the bytes a training step keeps between forward and backward.

    Counts what each layer's products read (layer inputs, queries, keys, values,
    attention outputs, hidden activations); with `remat="full"` only layer inputs stay.
    A mixture-of-depths block keeps those of the tokens it has room for.
    """
    size, d = DTYPE_BYTES[model.compute_dtype], model.d_model
    tokens = batch * num_tokens(model, seq_len)
    total = 0.0
    for own, attention, mlp, inside in model_layers(model):
        if model.recompute == "full":
            total += d
            continue
        part = _attention(own, attention)
        keys = 1.0 if ATTENTIONS[attention].listed(own) else part.keys
        heads = model.num_heads * part.side + model.num_kv_heads * keys
        layer = 4 * d + heads * (own.key_dim + own.value_dim)
        layer += d * (own.convolution > 0)
        for group in own.beside.values():
            layer += head_numbers(group)
        layer += _mlp_width(own, mlp)[1] * _mlp_matrices(model)
        layer += sum(map(own.rank, RANKS))
        if inside < 1:
            layer = d + min(1.0, inside * model.mod.capacity_factor) * layer
        total += layer
    return round(total * tokens * size)
