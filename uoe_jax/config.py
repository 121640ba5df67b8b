"""Frozen experiment configs, their validation and their JSON form. Imports no jax."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from uoe_jax.errors import ConfigError, nearest

AttentionKind = Literal["dense", "union", "moba", "moh"]
MlpKind = Literal["dense", "union", "moe"]
BlockKind = Literal["all", "mod"]
Gate = Literal["sigmoid", "softmax", "straight_through"]
MoeGate = Literal["softmax", "softmax_all", "sigmoid"]
RouterKind = Literal["token", "expert_choice", "selection", "hierarchical"]
DType = Literal["float32", "bfloat16"]

# What a token's routing depends on. A causal model takes only routers that look back.
ROUTER_SEES: dict[str, str] = {
    "token": "the token itself (causal: the first token of its patch)",
    "selection": "in a causal model earlier segments only, otherwise the whole sample",
    "hierarchical": "as selection, then the token itself",
    "expert_choice": "every token of the sample",
}
CAUSAL_ROUTERS = ("token", "selection", "hierarchical")


@dataclass(frozen=True, kw_only=True)
class UnionConfig:
    """Union of experts: each token (or patch) uses `top_k` of `num_experts` parts.

    In attention an expert is `num_kv_heads / num_experts` key/value heads with their
    query heads; in the MLP it is a slice of `d_ff / num_experts` neurons.
    """

    num_experts: int = 8
    top_k: int = 4
    router: RouterKind = "token"
    patch_size: int = 1  # consecutive tokens that share one routing decision
    num_shared: int = 0  # always-on experts, counted in num_experts and in top_k
    segment_size: int = 64  # selection: tokens between two decisions of a causal model
    selected: int = 0  # hierarchical: experts a segment keeps for its tokens' top_k
    shared_kv: bool = False  # attention: route queries, keys and values of all tokens
    # Training: rows an expert takes, over T*X/E; documents packed in a row share them.
    capacity_factor: float | None = None
    gate: Gate = "sigmoid"
    balance_loss: float = 0.01  # weight of the Switch load-balance loss
    router_z_loss: float = 0.001
    bias_update_rate: float = 0.0  # loss-free balancing; 0 switches it off
    router_init_std: float = 0.02

    @property
    def keep(self) -> float:
        """Share of the experts that a token uses, X/E."""
        return self.top_k / self.num_experts


@dataclass(frozen=True, kw_only=True)
class UnionOverrides:
    """Where attention's union differs from `ModelConfig.union`; None: the same.

    A router that has no capacity leaves the union's out.
    """

    num_experts: int | None = None
    top_k: int | None = None
    router: RouterKind | None = None
    patch_size: int | None = None
    num_shared: int | None = None
    segment_size: int | None = None
    selected: int | None = None
    shared_kv: bool | None = None
    gate: Gate | None = None
    balance_loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class MobaConfig:
    """Block-sparse attention: each query sees its own and `top_k - 1` other blocks.

    MoBA (Lu et al. 2025): blocks are picked by the product of the query with the mean
    key of the block; in a causal model earlier ones.
    """

    block_size: int = 64
    top_k: int = 3


@dataclass(frozen=True, kw_only=True)
class ModConfig:
    """Mixture of depths: a block that only the tokens which ask for it pass through.

    Raposo et al. 2024, with a decision that doesn't look ahead: a token enters where
    its score is positive, until the sample's capacity is full.
    """

    keep: float = 0.5  # share of tokens the balance aims at
    # Room of a training sample over keep * T; documents packed in a row share it.
    capacity_factor: float = 1.25
    # Of the way to the bias at which `keep` of a batch's tokens enter, each step.
    bias_update_rate: float = 0.2
    router_z_loss: float = 0.0
    router_init_std: float = 0.02


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Mixture-of-experts baseline: whole MLPs as experts, `top_k` of them per token."""

    num_experts: int = 8
    top_k: int = 2
    router: Literal["token", "expert_choice"] = "token"
    # softmax: over the chosen; softmax_all: over all experts (Switch); sigmoid: scores
    # normalised over the chosen (DeepSeek-V3).
    gate: MoeGate = "softmax"
    num_shared: int = 0  # always-on experts, counted in num_experts and in top_k
    # Training: rows an expert takes, over T*X/E; documents packed in a row share them.
    capacity_factor: float | None = None
    d_expert: int | None = None  # None: d_ff / top_k, so active FLOPs equal dense's
    balance_loss: float = 0.01
    router_z_loss: float = 0.001
    bias_update_rate: float = 0.0
    router_init_std: float = 0.02


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder language model, encoder classifier or vision transformer."""

    kind: Literal["decoder", "encoder", "vision"] = "decoder"
    vocab_size: int = 256
    max_seq_len: int = 256
    d_model: int = 128
    d_ff: int = 512
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 8
    head_dim: int = 16
    # Kinds are cycled over the layers: ("dense", "union") alternates.
    attention: tuple[AttentionKind, ...] = ("dense",)
    mlp: tuple[MlpKind, ...] = ("dense",)
    blocks: tuple[BlockKind, ...] = ("all",)
    union: UnionConfig = field(default_factory=UnionConfig)
    union_attention: UnionOverrides = field(default_factory=UnionOverrides)
    moe: MoeConfig = field(default_factory=MoeConfig)
    moba: MobaConfig = field(default_factory=MobaConfig)
    mod: ModConfig = field(default_factory=ModConfig)
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-6
    position: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10_000.0
    activation: Literal["gelu", "swiglu"] = "gelu"
    use_bias: bool = False
    tie_embeddings: bool = True
    dropout: float = 0.0
    num_classes: int = 10  # encoder and vision
    image_size: int = 8  # vision: square images, pixels a side
    image_channels: int = 1
    image_patch: int = 2  # vision: pixels a side of one token
    remat: Literal["none", "full", "dots"] = "none"
    scan_layers: bool = True
    param_dtype: DType = "float32"
    compute_dtype: DType = "float32"

    @property
    def causal(self) -> bool:
        """Whether a token sees only its predecessors."""
        return self.kind == "decoder"

    @property
    def num_query_groups(self) -> int:
        """Query heads that share one key/value head (G)."""
        return self.num_heads // self.num_kv_heads

    @property
    def d_expert(self) -> int:
        """Hidden width of one MoE expert."""
        return self.moe.d_expert or self.d_ff // self.moe.top_k

    def union_for(self, part: Literal["attention", "mlp"]) -> UnionConfig:
        """Return the union of a part: attention may override `union`."""
        if part == "mlp":
            return self.union
        changes = dataclasses.asdict(self.union_attention)
        given: dict[str, Any] = {k: v for k, v in changes.items() if v is not None}
        if given.get("router", "token") != "token":
            given["capacity_factor"] = None
        return dataclasses.replace(self.union, **given)

    @property
    def block_kinds(self) -> tuple[BlockKind, ...]:
        """Kind of every block, the pattern cycled."""
        return tuple(self.blocks[i % len(self.blocks)] for i in range(self.num_layers))

    @property
    def layer_kinds(self) -> tuple[tuple[AttentionKind, MlpKind], ...]:
        """(attention, mlp) kind of every layer, the patterns cycled."""
        return tuple(
            (self.attention[i % len(self.attention)], self.mlp[i % len(self.mlp)])
            for i in range(self.num_layers)
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where examples come from and how they become batches."""

    source: Literal[
        "auto",
        "stdlib",
        "digits",
        "listops",
        "pathfinder",
        "text",
        "jsonl",
        "parquet",
        "npz",
        "tfds",
    ] = "auto"
    path: str | None = None  # file, folder, glob, or tfds:NAME
    encoding: str = "auto"  # auto: UTF-8, or what the first bytes say; else a name
    data_dir: str | None = None  # tfds: folder of built datasets
    tokenizer: str = "byte"  # "byte", "bpe" (trained on the data) or a tokenizer.json
    bpe_vocab_size: int = 4096
    text_key: str = "text"  # field that holds the text; a.b is field b of field a
    bad_records: Literal["error", "skip"] = "error"  # jsonl, parquet: without a text
    seq_len: int | None = None  # None: the model's max_seq_len
    batch_size: int = 16  # global, in sequences (or images)
    pack: Literal["stream", "documents"] = "stream"
    bad_utf8: Literal["error", "replace", "skip"] = "error"
    valid_fraction: float = 0.05
    test_fraction: float = 0.05
    max_bytes: int | None = None  # use only the first so many bytes of text
    num_examples: int | None = None  # listops, pathfinder: of train; None: as published
    min_length: int = 500  # listops: tokens, excluded
    max_length: int = 2000  # listops: tokens, excluded
    cache_dir: str | None = None  # prepared arrays; None: a folder in the user's cache
    allow_changed: bool = False  # accept a source that differs from its manifest
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with a schedule and clipping."""

    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int = 50
    final_lr_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # global gradient norm; 0 switches clipping off
    router_lr_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices by axis name; data 0 means all that are left."""

    data: int = 0  # batch
    fsdp: int = 1  # batch too, with weights and optimizer state split as well
    tensor: int = 1  # experts; heads and MLP columns of dense layers
    sequence: int = 1  # tokens of a sequence


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """How the devices of an axis divide the work and talk; see docs/layouts.md."""

    # all_reduce: every tensor device holds all tokens between layers; reduce_scatter:
    # its share of them, gathered before each layer.
    tensor_reduce: Literal["all_reduce", "reduce_scatter"] = "all_reduce"
    # Which experts a tensor device holds: neighbours, or every tensor-th.
    experts: Literal["contiguous", "round_robin"] = "contiguous"
    # Routed MLPs: every tensor device sees all tokens, or sends rows to the experts.
    dispatch: Literal["replicated", "all_to_all"] = "replicated"
    # Dense attention: keys and values travel round the ring, or are gathered.
    sequence_attention: Literal["ring", "gather"] = "ring"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Budgets, cadence and safety of one run."""

    steps: int = 300
    max_seconds: float | None = None  # wall-clock budget; the run ends cleanly
    accumulate: int = 1  # microbatches per step
    z_loss: float = 0.0  # weight of log(sum exp logits)^2
    label_smoothing: float = 0.0
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 8
    save_every: int = 100
    keep_checkpoints: int = 2
    max_bad_steps: int = 5  # non-finite steps in a row before the run stops
    loss_chunk: int = 4096  # tokens whose logits are alive at once
    tensorboard: bool = False
    wandb: bool = False
    profile: bool = False  # trace a few steps into RUN/profile
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Everything one run depends on."""

    name: str = "run"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def seq_len(self) -> int:
        """Tokens per training example."""
        return self.data.seq_len or self.model.max_seq_len


def to_json(config: Any) -> str:
    """Return a config as indented JSON text."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def config_hash(config: Any) -> str:
    """Return 16 hex digits that identify a config's content."""
    return content_hash(dataclasses.asdict(config))


def content_hash(content: dict[str, Any]) -> str:
    """Return 16 hex digits that identify a config as a dict, or what is left of it."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def from_json(text: str, cls: type = ExperimentConfig) -> Any:
    """Return the config written by `to_json`; raise ConfigError on anything else."""
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"config is not JSON ({error}); restore config.json"
        ) from None
    return _build(cls, raw, cls.__name__)


def _build(cls: type, raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} is {raw!r}; expected an object with its fields")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    for key in raw:
        if key not in known:
            raise ConfigError(f"{where} has no field {key!r}; {nearest(key, known)}")
    values = {k: _convert(hints[k], v, f"{where}.{k}") for k, v in raw.items()}
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check one JSON value against its annotation and return it in Python form."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        ok = value in args
    elif origin is tuple:
        ok = isinstance(value, (list, tuple)) and len(value) > 0
        if ok:
            return tuple(_convert(args[0], v, where) for v in value)
    elif origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    elif hint is float:
        ok = isinstance(value, (int, float)) and not isinstance(value, bool)
        value = float(value) if ok else value
    else:
        ok = type(value) is hint
    if not ok:
        raise ConfigError(f"{where} is {value!r}; expected {_describe(hint)}")
    return value


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return getattr(hint, "__name__", str(hint))
