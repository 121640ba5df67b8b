"""Frozen experiment configs, their validation and their JSON form. Imports no jax."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from uoe_jax.errors import ConfigError, DataError, choose, nearest, shown
from uoe_jax.fields import (
    Bounds,
    Bytes,
    Checked,
    Count,
    Fraction,
    Known,
    Name,
    NotNegative,
    Positive,
    Seed,
    Whole,
    convert,
    field_hints,
)
from uoe_jax.files import format_json, parse_json
from uoe_jax.kinds import ATTENTIONS, MLPS, ROUTERS
from uoe_jax.rules import NO_RULES, Rules

# Of the kinds that are registered, too: see kinds.py.
AttentionKind = Annotated[Literal["dense", "union", "moba", "moh"], Known(ATTENTIONS)]
MlpKind = Annotated[Literal["dense", "union", "moe"], Known(MLPS)]
BlockKind = Literal["all", "mod"]
Gate = Literal["sigmoid", "softmax", "straight_through", "relu"]
MoeGate = Literal["softmax", "softmax_all", "sigmoid"]
RouterKind = Annotated[
    Literal["token", "expert_choice", "selection", "hierarchical", "threshold"],
    Known(ROUTERS),
]
DType = Literal["float32", "bfloat16"]

Depth = Annotated[int, Bounds(least=1, most=10_000)]
Length = Annotated[int, Bounds(least=1, most=2**24)]  # tokens; more fills any memory
Pixels = Annotated[int, Bounds(least=1, most=2**16)]
Taps = Annotated[int, Bounds(least=0, most=64)]
PatchSize = Annotated[int, Bounds(least=1, most=128)]
# Room beyond num_experts / top_k holds every token, whatever the router does.
Capacity = Annotated[float, Bounds(above=0, least=1e-6, most=65_536)]
Share = Annotated[float, Bounds(above=0, below=1)]
UpToOne = Annotated[float, Bounds(least=0, most=1)]
Weight = Annotated[float, Bounds(above=0, most=1)]
Temperature = Annotated[float, Bounds(least=0.1, most=100)]


# The field of `LayerWidths` that has the ranks of a weight of the MLP.
RANKS = {"w_up": "up_rank", "w_gate": "gate_rank", "w_down": "down_rank"}


@dataclass(frozen=True, kw_only=True)
class UnionConfig(Checked):
    """Union of experts: each token (or patch) uses `top_k` of `num_experts` parts.

    In attention an expert is `num_kv_heads / num_experts` key/value heads with their
    query heads; in the MLP it is a slice of `d_ff / num_experts` neurons.
    """

    num_experts: Count = 8  # parts of each attention and MLP
    top_k: Count = 4  # parts that a token uses
    router: RouterKind = "token"  # who decides, and from what
    patch_size: PatchSize = 1  # consecutive tokens that share one routing decision
    num_shared: Whole = 0  # always-on parts, counted in num_experts and in top_k
    segment_size: Count = 64  # selection: tokens between a causal model's decisions
    selected: Whole = 0  # hierarchical: experts a segment keeps for its tokens' top_k
    # Training: each step draws for each layer how many experts are on, from this to
    # top_k; 0: always top_k. The model can then be used with any of them.
    least_top_k: Whole = 0
    # threshold: experts that a token takes at most, top_k is their mean; 0: twice it.
    most_picks: Whole = 0
    # threshold: of the way to the score that top_k / num_experts exceed, each step.
    threshold_rate: UpToOne = 0.1
    shared_kv: bool = False  # attention: route queries, keys and values of all tokens
    gated_values: bool = False  # attention: a key's value times the key's own gate
    # attention: a router of its own says which experts store a token's key and value.
    key_router: bool = False
    # Training: rows a part takes, over T*X/E; documents packed in a row share them.
    capacity_factor: Capacity | None = None
    gate: Gate = "sigmoid"  # what a part's output is multiplied with
    balance_loss: NotNegative = 0.01  # weight of the Switch load-balance loss
    router_z_loss: NotNegative = 0.001  # weight of log(sum exp scores)^2
    bias_update_rate: NotNegative = 0.0  # loss-free balancing; 0 switches it off
    router_init_std: NotNegative = 0.02  # deviation of the router's first weights

    @property
    def most(self) -> int:
        """Experts that a token takes at most, always-on ones among them."""
        if not ROUTERS[self.router].varies:
            return self.top_k
        return self.most_picks or min(2 * self.top_k, self.num_experts)

    @property
    def keep(self) -> float:
        """Share of the experts that a token uses, X/E."""
        return self.top_k / self.num_experts


@dataclass(frozen=True, kw_only=True)
class UnionOverrides(Checked):
    """Where attention's union differs from `ModelConfig.union`; None: the same.

    A router that has no capacity leaves the union's out.
    """

    num_experts: Count | None = None  # parts of attention
    top_k: Count | None = None  # parts of attention that a token uses
    router: RouterKind | None = None  # of attention
    patch_size: PatchSize | None = None  # tokens that share a decision of attention
    num_shared: Whole | None = None  # always-on parts of attention
    segment_size: Count | None = None  # tokens between decisions of attention
    least_top_k: Whole | None = None  # parts of attention that training has on at least
    most_picks: Whole | None = None  # parts of attention that a token takes at most
    # Parts of attention that a segment keeps for its tokens.
    selected: Whole | None = None
    shared_kv: bool | None = None  # route queries alone
    gated_values: bool | None = None  # values times their gates
    key_router: bool | None = None  # a router of its own for keys and values
    gate: Gate | None = None  # of attention's parts
    balance_loss: NotNegative | None = None  # weight of attention's balance loss


@dataclass(frozen=True, kw_only=True)
class MobaConfig(Checked):
    """Block-sparse attention: each query sees its own and `top_k - 1` other blocks.

    MoBA (Lu et al. 2025): blocks are picked by the product of the query with the mean
    key of the block; in a causal model earlier ones.
    """

    block_size: Count = 64  # keys in a block
    top_k: Count = 3  # blocks that a query sees, its own among them


@dataclass(frozen=True, kw_only=True)
class ModConfig(Checked):
    """Mixture of depths: a block that only the tokens which ask for it pass through.

    Raposo et al. 2024, with a decision that doesn't look ahead: a token enters where
    its score is positive, until the sample's capacity is full.
    """

    keep: Share = 0.5  # share of tokens the balance aims at
    # Room of a training sample over keep * T; documents packed in a row share it.
    capacity_factor: Capacity = 1.25
    # Of the way to the bias at which `keep` of a batch's tokens enter, each step.
    bias_update_rate: UpToOne = 0.2
    router_z_loss: NotNegative = 0.0  # weight of the squared scores
    router_init_std: NotNegative = 0.02  # deviation of the first weights that score


@dataclass(frozen=True, kw_only=True)
class MoeConfig(Checked):
    """Mixture-of-experts baseline: whole MLPs as experts, `top_k` of them per token."""

    num_experts: Count = 8  # whole MLPs
    top_k: Count = 2  # MLPs that a token uses
    # Tokens choose experts, or experts tokens (not for decoders).
    router: Literal["token", "expert_choice"] = "token"
    # softmax: over the chosen; softmax_all: over all experts (Switch); sigmoid: scores
    # normalised over the chosen (DeepSeek-V3).
    gate: MoeGate = "softmax"
    num_shared: Whole = 0  # always-on MLPs, counted in num_experts and top_k
    # Training: rows an MLP takes, over T*X/E; documents packed in a row share them.
    capacity_factor: Capacity | None = None
    d_expert: Count | None = None  # None: d_ff / top_k, so active FLOPs equal dense's
    balance_loss: NotNegative = 0.01  # weight of the mixture's load-balance loss
    router_z_loss: NotNegative = 0.001  # weight of log(sum exp scores of MLPs)^2
    bias_update_rate: NotNegative = 0.0  # DeepSeek-V3's loss-free balancing; 0: off
    router_init_std: NotNegative = 0.02  # deviation of the mixture's first scores


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Checked):
    """How rotary frequencies are stretched for longer texts than a model began with.

    linear: all by `factor` (Chen et al. 2023). llama3: those whose waves are longer
    than `original_max_seq_len` / `low_freq_factor`, and by parts down to / `high`.
    """

    kind: Literal["none", "linear", "llama3"] = "none"  # which stretching
    factor: Positive = 1.0  # by which frequencies are divided
    low_freq_factor: Positive = 1.0  # llama3: waves that fit less often are stretched
    high_freq_factor: Positive = 4.0  # llama3: waves that fit more often stay
    original_max_seq_len: Length = 8192  # llama3: tokens that the model began with


@dataclass(frozen=True, kw_only=True)
class LayerWidths(Checked):
    """Where layers are narrower than the model: a number a layer; None: none is.

    A low rank r holds a product's matrix [in, out] as two, [in, r] and [r, out].
    """

    d_ff: tuple[Count, ...] | None = None  # neurons of each layer's MLP
    # Of a head's queries and keys: even where rotated, when whole pairs are kept.
    key_dim: tuple[Count, ...] | None = None
    value_dim: tuple[Count, ...] | None = None  # of a head's values
    up_rank: tuple[Whole, ...] | None = None  # of each w_up; 0: the whole matrix
    gate_rank: tuple[Whole, ...] | None = None  # of each w_gate; 0: the whole matrix
    down_rank: tuple[Whole, ...] | None = None  # of each w_down; 0: the whole matrix

    def of_layer(self, layer: int) -> LayerWidths:
        """Return the widths of one layer, as tuples of one number."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return LayerWidths(**{n: w and w[layer : layer + 1] for n, w in own.items()})


@dataclass(frozen=True, kw_only=True)
class HeadGroups(Checked):
    """Heads of every layer beside those of its kind of attention: local and full ones.

    All tokens use them. A layer of union attention then has local, full and routed
    heads, as in MoSA (Piekos et al. 2025), whose hybrid layers these are.
    """

    local: Whole = 0  # query heads that see the last `window` tokens only
    local_kv: Whole = 0  # key and value heads of local ones; 0: shared as the model's
    window: Count = 256  # tokens that local heads see, and that a cache keeps of them
    full: Whole = 0  # query heads that see all tokens before them
    full_kv: Whole = 0  # key and value heads of the full ones; 0: shared likewise


def cached_dims(keys: int, values: int, head: int) -> tuple[int, int]:
    """Return the widths that keys and values of so many numbers have in a cache.

    Narrow ones have zeros up to a multiple of 8, of keys in both halves, and never more
    than the model's heads: rows are then read 16 bytes at a time.
    """
    up = lambda width: -(-width // 8) * 8
    return min(2 * up(-(-keys // 2)), head), min(up(values), head)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """A decoder language model, an encoder or a vision transformer."""

    # decoder: predicts the next token; encoder: reads texts; vision: images.
    kind: Literal["decoder", "encoder", "vision"] = "decoder"
    vocab_size: Count = 256  # token ids
    max_seq_len: Length = 256  # tokens of the longest input
    d_model: Count = 128  # width
    d_ff: Count = 512  # neurons of an MLP
    num_layers: Depth = 4  # blocks of attention and MLP
    num_heads: Count = 8  # query heads
    num_kv_heads: Count = 8  # key and value heads; fewer: shared by query heads
    head_dim: Count = 16  # width of a head
    widths: LayerWidths = field(default_factory=LayerWidths)
    head_groups: HeadGroups = field(default_factory=HeadGroups)
    # Tokens, its own among them, that a causal convolution mixes into each token before
    # attention and its router; 0: none.
    convolution: Taps = 0
    # Kinds of attention, cycled over the layers: dense union alternates.
    attention: tuple[AttentionKind, ...] = ("dense",)
    # Kinds of MLP, cycled likewise.
    mlp: tuple[MlpKind, ...] = ("dense",)
    # all: every token enters; mod: some do. Cycled likewise.
    blocks: tuple[BlockKind, ...] = ("all",)
    union: UnionConfig = field(default_factory=UnionConfig)
    union_attention: UnionOverrides = field(default_factory=UnionOverrides)
    moe: MoeConfig = field(default_factory=MoeConfig)
    moba: MobaConfig = field(default_factory=MobaConfig)
    mod: ModConfig = field(default_factory=ModConfig)
    # Before attention, MLP and head.
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: Positive = 1e-6  # added to variances
    norm_place: Literal["pre", "post"] = "pre"  # post: after each residual sum
    embed_norm: bool = False  # of the embeddings too
    qk_norm: bool = False  # RMS norm of each query and key head, before rotation
    # What a head reads times 2 sigmoid of a product of what attention reads: 1 at the
    # start, near 0 where a head has nothing to say.
    output_gate: bool = False
    # A learned logit a head in the softmax's denominator: what it gives to no token.
    sink: bool = False
    # Rotated queries and keys, or a learned vector a position.
    position: Literal["rope", "learned"] = "rope"
    rope_theta: Positive = 10_000.0  # base of the rotation's wavelengths
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    # Tokens that attention sees, itself and those before it; 0: all. Cycled as kinds.
    window: tuple[Whole, ...] = (0,)
    # gelu: the tanh form (Hendrycks and Gimpel 2016); gelu_erf: the exact one.
    activation: Literal["gelu", "gelu_erf", "swiglu"] = "gelu"
    use_bias: bool = False  # of attention and MLP
    # Where attention and MLP differ from `use_bias`; qkv: no bias of the output.
    attention_bias: Literal["none", "qkv", "all"] | None = None
    mlp_bias: bool | None = None  # None: as use_bias
    tie_embeddings: bool = True  # the head's weights are the embedding's
    token_types: Whole = 0  # learned vectors of token types, such as BERT's sentences
    class_token: bool = False  # vision: a learned token before the patches
    # What classes are read from; tanh: a layer of the first token (BERT's pooler).
    pooling: Literal["mean", "first", "tanh"] = "mean"
    # encoder: classes of a text, a token at each place, or nothing (hidden states).
    encoder_head: Literal["classes", "tokens", "none"] = "classes"
    dropout: Fraction = 0.0  # of embeddings and of what is added, in training
    num_classes: Count = 10  # encoder and vision: what is told apart
    image_size: Pixels = 8  # vision: square images, pixels a side
    image_channels: Count = 1  # vision: numbers of a pixel
    image_patch: Pixels = 2  # vision: pixels a side of one token
    # Activations computed again in the backward pass: none, all, or all but products.
    # auto: none where that fits into a device's memory, which also settles scan_layers
    # and train.accumulate as a run begins; else all.
    remat: Literal["none", "full", "dots", "auto"] = "none"
    scan_layers: bool = True  # compile one layer of each kind, not all
    param_dtype: DType = "float32"  # of weights
    compute_dtype: DType = "float32"  # of activations and products
    # Operands of layers' products rounded to float8_e4m3fn in the forward pass of
    # training and validation: a scale a tensor, or one a row and a weight's column.
    float8: Literal["none", "tensor", "rows"] = "none"

    @property
    def causal(self) -> bool:
        """Whether a token sees only its predecessors."""
        return self.kind == "decoder"

    @property
    def recompute(self) -> Literal["none", "full", "dots"]:
        """What is computed again; all where auto isn't settled."""
        return "full" if self.remat == "auto" else self.remat

    @property
    def rotates(self) -> bool:
        """Whether queries and keys are rotated to their positions."""
        return choose("position", self.position, {"rope": True, "learned": False})

    @property
    def centred(self) -> bool:
        """Whether norms subtract the mean and have a bias."""
        return choose("norm", self.norm, {"rmsnorm": False, "layernorm": True})

    @property
    def gated(self) -> bool:
        """Whether an MLP has a gate beside its up projection."""
        known = {"gelu": False, "gelu_erf": False, "swiglu": True}
        return choose("activation", self.activation, known)

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        known = {"none": False, "qkv": True, "all": True}
        given = self.attention_bias
        return self.use_bias if given is None else choose("bias", given, known)

    @property
    def output_bias(self) -> bool:
        """Whether attention's output has a bias."""
        given = self.attention_bias
        return self.use_bias if given is None else given == "all"

    @property
    def has_mlp_bias(self) -> bool:
        """Whether MLPs have biases."""
        return self.use_bias if self.mlp_bias is None else self.mlp_bias

    @property
    def post_norm(self) -> bool:
        """Whether norms come after the residual sums, not before the parts."""
        return choose("norm_place", self.norm_place, {"pre": False, "post": True})

    @property
    def num_image_tokens(self) -> int:
        """Tokens of an image: its patches, and the class token."""
        patches = (self.image_size // self.image_patch) ** 2
        return patches + self.class_token

    @property
    def windows(self) -> tuple[int, ...]:
        """The window of every layer, the pattern cycled."""
        return tuple(self.window[i % len(self.window)] for i in range(self.num_layers))

    def of_layer(self, layer: int) -> ModelConfig:
        """Return the config of a model all of whose layers are as this one.

        That is of its window and its widths: kinds stay as they are. Widths that are
        the model's own are left out.
        """
        window = (self.windows[layer],)
        if self.widths == LayerWidths():
            # Most models: made for each layer by all that counts layers.
            same = self.window == window
            return self if same else dataclasses.replace(self, window=window)
        widths = self.widths.of_layer(layer)
        d_ff = widths.d_ff[0] if widths.d_ff else self.d_ff
        usual = {"key_dim": (self.head_dim,), "value_dim": (self.head_dim,)}
        usual |= dict.fromkeys(RANKS.values(), (0,))
        left = {"d_ff": None}
        left |= {n: None for n, width in usual.items() if getattr(widths, n) == width}
        widths = dataclasses.replace(widths, **left)
        return dataclasses.replace(self, window=window, d_ff=d_ff, widths=widths)

    @property
    def key_dim(self) -> int:
        """Width of a head's queries and keys, in the config of a layer."""
        given = self.widths.key_dim
        return given[0] if given else self.head_dim

    @property
    def value_dim(self) -> int:
        """Width of a head's values, in the config of a layer."""
        given = self.widths.value_dim
        return given[0] if given else self.head_dim

    @property
    def kernel_dim(self) -> int:
        """Width at which heads attend, in the config of a layer.

        Keys and values of other widths than the model's have zeros up to one width, a
        multiple of 8, as kernels want them.
        """
        if self.widths.key_dim is None and self.widths.value_dim is None:
            return self.head_dim
        return -(-max(self.key_dim, self.value_dim) // 8) * 8

    @property
    def cached_dims(self) -> tuple[int, int]:
        """Widths of keys and values as a cache has them, in the config of a layer."""
        return cached_dims(self.key_dim, self.value_dim, self.head_dim)

    def rank(self, weight: str) -> int:
        """Return the rank of a weight of the MLP in the config of a layer; 0: whole."""
        given = getattr(self.widths, RANKS[weight])
        return given[0] if given else 0

    @property
    def num_query_groups(self) -> int:
        """Query heads that share one key/value head (G)."""
        return self.num_heads // self.num_kv_heads

    @property
    def d_expert(self) -> int:
        """Hidden width of one MoE expert."""
        return self.moe.d_expert or self.d_ff // self.moe.top_k

    @property
    def beside(self) -> dict[str, ModelConfig]:
        """Groups of heads beside those of a layer's kind, by name, in a layer's config.

        Each as the config of the dense attention that it is, without an output bias.
        """
        return _groups(self)

    @property
    def layer_heads(self) -> int:
        """Query heads of a layer, those of all groups."""
        return self.num_heads + self.head_groups.local + self.head_groups.full

    @property
    def additions(self) -> tuple[str, ...]:
        """Options that give layers parts which plain ones don't have.

        What cuts, measures or stores plain layers refuses these.
        """
        found = {
            "model.head_groups": bool(self.head_groups.local or self.head_groups.full),
            "model.convolution": self.convolution > 0,
            "model.output_gate": self.output_gate,
            "model.sink": self.sink,
        }
        return tuple(name for name, given in found.items() if given)

    @property
    def draws(self) -> bool:
        """Whether training draws how many experts are on."""
        parts = (self.union, self.union_attention)
        return any(part.least_top_k for part in parts)

    def union_for(self, part: Literal["attention", "mlp"]) -> UnionConfig:
        """Return the union of a part: attention may override `union`."""
        if part == "mlp":
            return self.union
        changes = dataclasses.asdict(self.union_attention)
        given: dict[str, Any] = {k: v for k, v in changes.items() if v is not None}
        if not ROUTERS[given.get("router", "token")].capacity:
            given["capacity_factor"] = None
        return dataclasses.replace(self.union, **given)

    @property
    def block_kinds(self) -> tuple[BlockKind, ...]:
        """Kind of every block, the pattern cycled."""
        return tuple(self.blocks[i % len(self.blocks)] for i in range(self.num_layers))

    @property
    def layer_kinds(self) -> tuple[tuple[str, str], ...]:
        """(attention, mlp) kind of every layer, the patterns cycled."""
        return tuple(
            (self.attention[i % len(self.attention)], self.mlp[i % len(self.mlp)])
            for i in range(self.num_layers)
        )


@functools.lru_cache(256)
def _groups(model: ModelConfig) -> dict[str, ModelConfig]:
    groups, share = model.head_groups, model.num_query_groups
    sizes = {
        "local_attention": (groups.local, groups.local_kv, groups.window),
        "full_attention": (groups.full, groups.full_kv, 0),
    }
    return {
        name: dataclasses.replace(
            model,
            num_heads=heads,
            num_kv_heads=kv_heads or heads // share,
            window=(window,),
            attention=("dense",),
            attention_bias="qkv" if model.qkv_bias else "none",
            widths=LayerWidths(),
            head_groups=HeadGroups(),
        )
        for name, (heads, kv_heads, window) in sizes.items()
        if heads
    }


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """Where examples come from and how they become batches."""

    # What `path` holds; auto: as its name and content say.
    source: Literal[
        "auto",
        "stdlib",
        "digits",
        "listops",
        "pathfinder",
        "recall",
        "copying",
        "text",
        "jsonl",
        "parquet",
        "npz",
        "tfds",
    ] = "auto"
    path: str | None = None  # file, folder, glob, or tfds:NAME
    # Several texts, each with its share of the training rows: PATH=WEIGHT ...
    mix: tuple[str, ...] | None = None
    encoding: str = "auto"  # auto: UTF-8, or what the first bytes say; else a name
    data_dir: str | None = None  # tfds: folder of built datasets
    # byte, bpe (trained on the data), a tokenizer.json, or hf:NAME of the hub.
    tokenizer: str = "byte"
    bpe_vocab_size: Count = 4096  # entries of a trained tokenizer
    text_key: str = "text"  # field that holds the text; a.b is field b of field a
    bad_records: Literal["error", "skip"] = "error"  # jsonl, parquet: without a text
    # How messages are written: a run or a model's folder, or a Jinja file; not given:
    # the template of the run that is adapted, or ChatML.
    chat_template: str | None = None

    seq_len: Length | None = None  # None: the model's max_seq_len
    batch_size: Count = 16  # global, in sequences (or images)
    # Rows cut from one stream, or of whole documents that don't see each other.
    pack: Literal["stream", "documents"] = "stream"
    # Text files with bytes that aren't UTF-8.
    bad_utf8: Literal["error", "replace", "skip"] = "error"
    valid_fraction: Fraction = 0.05  # held out for validation
    test_fraction: Fraction = 0.05  # held out for a test at the end
    max_bytes: Bytes | None = None  # use only the first so many bytes of text
    num_examples: Count | None = None  # generated tasks: of train; None: all
    min_length: Whole = 500  # listops: tokens of the shortest, excluded
    max_length: Whole = 2000  # listops: tokens of the longest, excluded
    pairs: Count = 8  # recall: keys with a value, each asked for once
    cache_dir: str | None = None  # prepared arrays: folder or gs://; None: your cache
    allow_changed: bool = False  # accept a source that differs from its manifest
    seed: Seed = 0  # of the split and the order of examples


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Checked):
    """AdamW or Muon with a schedule and clipping."""

    # muon: matrices of attention and MLP by Muon, an expert's each for itself; all
    # else by AdamW. Both have the same rates and decay.
    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: NotNegative = 1e-3  # the highest, after the warm-up
    # How the rate falls; wsd: in the last fifth only, wsd_sqrt: there by 1 - sqrt.
    schedule: Literal["cosine", "linear", "constant", "wsd", "wsd_sqrt"] = "cosine"
    warmup_steps: Whole = 50  # while the rate rises
    final_lr_fraction: NotNegative = 0.1  # of the highest rate, at the end
    beta1: Fraction = 0.9  # decay of the mean of gradients
    beta2: Fraction = 0.95  # decay of the mean of their squares
    eps: Positive = 1e-8  # added to the root of that
    momentum: Fraction = 0.95  # muon: decay of the mean of gradients
    weight_decay: NotNegative = 0.1  # a step of rate r shrinks weights by r times this
    clip_norm: NotNegative = 1.0  # global gradient norm; 0 switches clipping off
    router_lr_scale: NotNegative = 1.0  # routers' rate over the others'
    # Decay of the mean of weights that is validated, saved and used; 0: the last ones.
    ema_decay: Fraction = 0.0


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Checked):
    """Devices by axis name; data 0 means all that are left."""

    data: Whole = 0  # batch
    fsdp: Count = 1  # batch too, with weights and optimizer state split as well
    tensor: Count = 1  # experts; heads and MLP columns of dense layers
    sequence: Count = 1  # tokens of a sequence


@dataclass(frozen=True, kw_only=True)
class LayoutConfig(Checked):
    """How the devices of an axis divide the work and talk; see docs/layouts.md."""

    # all_reduce: every tensor device holds all tokens between layers; reduce_scatter:
    # its share of them, gathered before each layer.
    tensor_reduce: Literal["all_reduce", "reduce_scatter"] = "all_reduce"
    # Which experts a tensor device holds: neighbours, or every tensor-th.
    experts: Literal["contiguous", "round_robin"] = "contiguous"
    # Routed MLPs: every tensor device sees all tokens, or sends rows to the experts.
    dispatch: Literal["replicated", "all_to_all"] = "replicated"
    # Dense attention: keys and values travel round the ring, or are gathered; or heads
    # are exchanged for tokens, which shares the work evenly.
    sequence_attention: Literal["ring", "gather", "heads"] = "ring"
    # A JSON file: which axis fsdp splits of some weights, if not the usual one.
    rules: Rules = NO_RULES
    # Which device stands where in a TPU's mesh. auto: jax's order, or one of fewer hops
    # on the axes that ring attention walks; ring: the fewest that a search finds.
    device_order: Literal["auto", "jax", "ring"] = "auto"

    @property
    def scatters(self) -> bool:
        """Whether tokens are spread over tensor between the parts of a layer."""
        known = {"all_reduce": False, "reduce_scatter": True}
        return choose("layout.tensor_reduce", self.tensor_reduce, known)

    @property
    def dispatches(self) -> bool:
        """Whether rows of routed MLPs travel to their experts."""
        known = {"replicated": False, "all_to_all": True}
        return choose("layout.dispatch", self.dispatch, known)

    @property
    def deals(self) -> bool:
        """Whether experts are dealt to the tensor devices one by one."""
        known = {"contiguous": False, "round_robin": True}
        return choose("layout.experts", self.experts, known)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked):
    """Budgets, cadence and safety of one run."""

    steps: Whole = 300  # updates of the weights
    max_seconds: Positive | None = None  # wall-clock budget; the run ends cleanly
    accumulate: Count = 1  # microbatches per step
    # A decoder's run whose probabilities this one learns beside its data; it is frozen.
    distill_from: str | None = None
    distill_weight: Weight = 0.5  # of what is learnt from it; the data's is the rest
    distill_temperature: Temperature = 2.0  # what its logits are divided by
    # Steps in which unions go from all experts on down to their top_k, in 4 stages.
    top_k_warmup_steps: Whole = 0
    z_loss: NotNegative = 0.0  # weight of log(sum exp logits)^2
    label_smoothing: Fraction = 0.0  # probability given to all classes alike
    log_every: Count = 10  # steps between printed lines
    eval_every: Count = 100  # steps between validations
    eval_batches: Count = 8  # of each validation
    save_every: Count = 100  # steps between checkpoints
    keep_checkpoints: Count = 2  # how many of the newest stay
    max_bad_steps: Count = 5  # non-finite steps in a row before the run stops
    # Leave out a step whose loss is above the running mean of the last 100 or so by
    # more than this many of their deviations; after 10 in a row, that is the new level.
    max_loss_jump: Positive | None = None
    # Compute the gradients of every so many-th step twice more and compare their bits;
    # 0: never. Only for kernels that are deterministic.
    replay_every: Whole = 0
    loss_chunk: Count = 4096  # tokens whose logits are alive at once
    tensorboard: bool = False  # event files in RUN/tensorboard
    wandb: bool = False  # send metrics to Weights & Biases
    profile: bool = False  # trace a few steps into RUN/profile
    seed: Seed = 0  # of weights and dropout


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig(Checked):
    """Everything one run depends on."""

    name: Name = "run"  # of the run and, under runs/, of its folder
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
    return format_json(dataclasses.asdict(config), indent=2) + "\n"


def config_hash(config: Any) -> str:
    """Return 16 hex digits that identify a config's content."""
    return content_hash(dataclasses.asdict(config))


def content_hash(content: dict[str, Any]) -> str:
    """Return 16 hex digits that identify a config as a dict, or what is left of it."""
    text = format_json(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def from_json(text: str, cls: type = ExperimentConfig) -> Any:
    """Return the config written by `to_json`; raise ConfigError on anything else.

    Types and literals are checked; `validation.read_config` checks everything.
    """
    try:
        raw = parse_json(text, "the config")
    except DataError as error:
        raise ConfigError(str(error)) from None
    return _build(cls, raw, cls.__name__)


def _build(cls: type, raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{where} is {shown(raw)}; expected an object with its fields"
        )
    hints = field_hints(cls)
    for key in raw:
        if key not in hints:
            fix = nearest(key, hints)
            raise ConfigError(f"{where} has no field {shown(key)}; {fix}")
    values = {}
    for name, value in raw.items():
        hint, place = hints[name], f"{where}.{name}"
        part = dataclasses.is_dataclass(hint)
        values[name] = (
            _build(typing.cast(type, hint), value, place)
            if part
            else convert(hint, value, place)
        )
    return cls(**values)
