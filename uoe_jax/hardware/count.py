"""Parameters, FLOPs and bytes of a model, counted from its config. Imports no jax.

One multiply-add is 2 FLOPs. Only matrix products are counted (projections, attention
scores and their weighted sums, MLPs, routers, head), causal attention by the pairs it
keeps. An expert that a token doesn't use isn't counted for that token: a saved FLOP is
counted once, as absent. Norms, softmax and elementwise work are left out, as usual in
model-FLOPs utilisation (MFU).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from uoe_jax.config import ModelConfig, MoeConfig, UnionConfig

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
        return (model.image_size // model.image_patch) ** 2
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
    d, h = model.d_model, model.head_dim
    heads, kv = model.num_heads, model.num_kv_heads
    side, keys = 2 * d * heads * h, 2 * d * kv * h
    if model.use_bias:
        side, keys = side + heads * h + d, keys + 2 * kv * h
    if kind not in ("union", "moh"):
        return _Attention(side, keys)
    union = model.union_for("attention")
    shared = kind == "moh" or union.shared_kv
    return _Attention(side, keys, union.keep, 1.0 if shared else union.keep)


def _mlp_width(model: ModelConfig, kind: str) -> tuple[int, float]:
    """Return the neurons of an MLP kind and how many of them a token uses."""
    if kind == "moe":
        moe = model.moe
        return moe.num_experts * model.d_expert, float(moe.top_k * model.d_expert)
    keep = model.union.keep if kind == "union" else 1.0
    return model.d_ff, model.d_ff * keep


def _mlp_params(model: ModelConfig, kind: str) -> int:
    d, matrices = model.d_model, _mlp_matrices(model)
    width, _ = _mlp_width(model, kind)
    biases = (matrices - 1) * width + d if model.use_bias else 0
    return matrices * d * width + biases


def _routers(model: ModelConfig, attention: str, mlp: str) -> list[tuple[int, int]]:
    """Return (columns scored, parameters beside them) of a layer's routers."""
    routers = []
    if attention in ("union", "moh"):
        routers.append(_router(model.union_for("attention"), attention == "moh"))
    if mlp == "union":
        routers.append(_router(model.union, False))
    if mlp == "moe":
        routers.append(_router(model.moe, False))
    return routers


def _router(config: UnionConfig | MoeConfig, moh: bool) -> tuple[int, int]:
    routed = config.num_experts - config.num_shared
    columns, rest = routed, 0
    if config.router in ("selection", "hierarchical"):
        rest = routed  # learned scores of the first segment
    if config.router == "hierarchical":
        columns *= 2
    if moh and config.num_shared:
        # Always-on heads against each other, and against the routed.
        columns += (config.num_shared if config.num_shared > 1 else 0) + 2
    return columns, rest


def _norm_params(model: ModelConfig) -> int:
    return model.d_model * (2 if model.centred else 1)


def _layers(model: ModelConfig) -> list[tuple[str, str, float]]:
    """Return (attention, mlp, share of the tokens that enter) of every layer."""
    pairs = zip(model.layer_kinds, model.block_kinds, strict=True)
    return [
        (*kinds, model.mod.keep if block == "mod" else 1.0) for kinds, block in pairs
    ]


def count_params(model: ModelConfig) -> dict[str, int]:
    """Return trainable parameters by part; their sum is the model's size."""
    d = model.d_model
    parts: Counter[str] = Counter()
    if model.kind == "vision":
        parts["embedding"] = model.image_patch**2 * model.image_channels * d + d
    else:
        parts["embedding"] = model.vocab_size * d
    if not model.rotates:
        parts["positions"] = num_tokens(model) * d
    for (attention, mlp), block in zip(
        model.layer_kinds, model.block_kinds, strict=True
    ):
        parts["attention"] += _attention(model, attention).params
        parts["mlp"] += _mlp_params(model, mlp)
        parts["norms"] += 2 * _norm_params(model)
        for columns, rest in _routers(model, attention, mlp):
            parts["routers"] += d * columns + rest
        if block == "mod":
            parts["routers"] += d
    parts["norms"] += _norm_params(model)
    if model.kind != "decoder":
        parts["head"] = d * model.num_classes + model.num_classes
    elif not model.tie_embeddings:
        parts["head"] = d * model.vocab_size
    return dict(parts)


def count_active_params(model: ModelConfig) -> int:
    """Return the parameters one token uses, embeddings and head included.

    Of a mixture-of-depths block the share of the tokens that enter it.
    """
    total = sum(count_params(model).values())
    for attention, mlp, inside in _layers(model):
        part, width = _attention(model, attention), _mlp_width(model, mlp)
        total -= round(part.params - inside * part.active)
        total -= round(_mlp_params(model, mlp) * (1 - inside * width[1] / width[0]))
    return total


def _mean_keys(length: float, causal: bool) -> float:
    """Return how many keys a token of a set of `length` sees on average."""
    return (length + 1) / 2 if causal else length


def _score_keys(model: ModelConfig, kind: str, length: float) -> float:
    """Return the keys that meet a token's queries, mean over heads, unused ones 0."""
    causal = model.causal
    if kind == "moba":
        return _block_keys(model, round(length))
    if kind not in ("union", "moh"):
        return _mean_keys(length, causal)
    union = model.union_for("attention")
    if kind == "moh" or union.shared_kv:
        return union.keep * _mean_keys(length, causal)
    # Every token is in an always-on expert's set, and a balanced share in another's.
    picks = union.top_k - union.num_shared
    share = picks / _experts_in_use(union)
    keys = union.num_shared * _mean_keys(length, causal)
    keys += picks * _mean_keys(length * share, causal)
    return keys / union.num_experts


def _experts_in_use(union: UnionConfig) -> int:
    """Return how many routed experts the tokens of one sample are spread over.

    Selection gives them all the same ones. The segments of a causal model may differ;
    their scores then cost less than is counted.
    """
    used = {"selection": union.top_k, "hierarchical": union.selected}
    return used.get(union.router, union.num_experts) - union.num_shared


def _block_keys(model: ModelConfig, length: int) -> float:
    """Return the keys a token of block-sparse attention sees on average."""
    size, others = model.moba.block_size, model.moba.top_k - 1
    total = 0
    for start in range(0, length, size):
        own = min(size, length - start)
        if model.causal:
            earlier = min(start // size, others) * size
            total += own * earlier + own * (own + 1) // 2
        else:
            total += own * min(length, own + others * size)
    return total / length


def _attention_flops(model: ModelConfig, kind: str, length: float) -> dict[str, float]:
    d, h, heads = model.d_model, model.head_dim, model.num_heads
    part = _attention(model, kind)
    projected = part.side * 2 * heads + part.keys * 2 * model.num_kv_heads
    parts = {
        "attention projections": 2.0 * d * h * projected,
        "attention scores": 4 * heads * h * _score_keys(model, kind, length),
    }
    if kind == "moba":  # each query meets the mean key of every block it may pick
        blocks = -(-length // model.moba.block_size) - 1
        parts["routers"] = 2 * heads * h * (blocks / 2 if model.causal else blocks)
    return parts


def flops_per_token(model: ModelConfig, seq_len: int | None = None) -> FlopCount:
    """Return one token's FLOPs in a sequence of `seq_len` tokens (or image patches).

    Routed attention is counted at balanced load: every routed expert in use sees the
    same share of a sample's tokens, all of them where samples select experts. A
    mixture-of-depths block is counted for the `keep` of the tokens that enter it, which
    see each other only.
    """
    length = num_tokens(model, seq_len)
    parts: dict[str, float] = defaultdict(float)
    for attention, mlp, inside in _layers(model):
        layer = _attention_flops(model, attention, length * inside)
        width = _mlp_width(model, mlp)[1]
        layer["mlp"] = 2 * model.d_model * _mlp_matrices(model) * width
        columns = sum(columns for columns, _ in _routers(model, attention, mlp))
        layer["routers"] = layer.get("routers", 0.0) + 2.0 * model.d_model * columns
        for name, flops in layer.items():
            parts[name] += inside * flops
        if inside < 1:
            parts["routers"] += 2 * model.d_model
    if model.kind == "decoder":
        parts["head"] = 2.0 * model.d_model * model.vocab_size
    else:
        parts["head"] = 2 * model.d_model * model.num_classes / length
    if model.kind == "vision":
        pixels = model.image_patch**2 * model.image_channels
        parts["embedding"] = 2.0 * pixels * model.d_model
    return FlopCount(
        parts={name: n for name, n in parts.items() if n or name != "routers"}
    )


def cache_bytes(
    model: ModelConfig, batch: int, length: int, dtype: str | None = None
) -> int:
    """Return the bytes of keys and values of `batch` sequences of `length` tokens.

    As they are allocated: a mixture-of-depths block needs room for every token.
    """
    size = DTYPE_BYTES[dtype or model.compute_dtype]
    token = 2 * model.num_kv_heads * model.head_dim * size
    keep = sum(_attention(model, kind).keys for kind, _ in model.layer_kinds)
    return round(batch * length * token * keep)


def state_bytes(model: ModelConfig) -> dict[str, int]:
    """Return bytes of parameters, gradients and AdamW moments, by kind."""
    count = sum(count_params(model).values())
    size = count * DTYPE_BYTES[model.param_dtype]
    # Float32 whatever the parameters are.
    gradients = count * DTYPE_BYTES["float32"]
    return {"parameters": size, "gradients": gradients, "optimizer": 2 * gradients}


def activation_bytes(model: ModelConfig, batch: int, seq_len: int | None = None) -> int:
    """Estimate the bytes a training step keeps between forward and backward.

    Counts what each layer's products read (layer inputs, queries, keys, values,
    attention outputs, hidden activations); with `remat="full"` only layer inputs stay.
    A mixture-of-depths block keeps those of the tokens it has room for.
    """
    size, d, h = DTYPE_BYTES[model.compute_dtype], model.d_model, model.head_dim
    tokens = batch * num_tokens(model, seq_len)
    total = 0.0
    for attention, mlp, inside in _layers(model):
        if model.remat == "full":
            total += d
            continue
        part = _attention(model, attention)
        heads = 2 * model.num_heads * part.side + 2 * model.num_kv_heads * part.keys
        layer = 4 * d + heads * h
        layer += _mlp_width(model, mlp)[1] * _mlp_matrices(model)
        if inside < 1:
            layer = d + min(1.0, inside * model.mod.capacity_factor) * layer
        total += layer
    return round(total * tokens * size)
