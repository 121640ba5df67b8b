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

AttentionKind = Literal["dense", "union"]
MlpKind = Literal["dense", "union", "moe"]
Gate = Literal["sigmoid", "softmax", "straight_through"]
DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class UnionConfig:
    """Union of experts: each token (or patch) uses `top_k` of `num_experts` parts.

    In attention an expert is `num_kv_heads / num_experts` key/value heads with their
    query heads; in the MLP it is a slice of `d_ff / num_experts` neurons.
    """

    num_experts: int = 8
    top_k: int = 4
    patch_size: int = 1  # consecutive tokens that share one routing decision
    gate: Gate = "sigmoid"
    balance_loss: float = 0.01  # weight of the Switch load-balance loss
    router_z_loss: float = 0.001
    bias_update_rate: float = 0.0  # loss-free balancing; 0 switches it off
    router_init_std: float = 0.02


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Mixture-of-experts baseline: whole MLPs as experts, `top_k` of them per token."""

    num_experts: int = 8
    top_k: int = 2
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
    union: UnionConfig = field(default_factory=UnionConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
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

    source: Literal["auto", "stdlib", "digits", "text", "jsonl", "npz", "tfds"] = "auto"
    path: str | None = None  # file, folder, glob, or tfds:NAME
    data_dir: str | None = None  # tfds: folder of built datasets
    tokenizer: str = "byte"  # "byte", "bpe" (trained on the data) or a tokenizer.json
    bpe_vocab_size: int = 4096
    text_key: str = "text"  # jsonl and tfds field that holds the text
    seq_len: int | None = None  # None: the model's max_seq_len
    batch_size: int = 16  # global, in sequences (or images)
    pack: Literal["stream", "documents"] = "stream"
    bad_utf8: Literal["error", "replace", "skip"] = "error"
    valid_fraction: float = 0.05
    test_fraction: float = 0.05
    max_bytes: int | None = None  # use only the first so many bytes of text
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
    """Devices by axis name; 0 means all that are left."""

    data: int = 0


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
    text = json.dumps(dataclasses.asdict(config), sort_keys=True)
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
