"""BERT: post-norm encoder with types of tokens, a pooler and a head of tokens."""

from __future__ import annotations

import functools
from typing import Any, Literal

from uoe_jax.config import ModelConfig
from uoe_jax.interop.families.fields import Raw, only, read, size
from uoe_jax.interop.families.shared import (
    layer_names,
    read_classes,
    read_gelu,
    write_classes,
    write_gelu,
)
from uoe_jax.interop.names import Family, Table

_EMBED = "bert.embeddings."
OUTER: Table = {
    "embed.embedding": (_EMBED + "word_embeddings.weight", "v d"),
    "embed.position.embedding": (_EMBED + "position_embeddings.weight", "t d"),
    "embed.token_type.embedding": (_EMBED + "token_type_embeddings.weight", "t d"),
    "embed.norm.scale": (_EMBED + "LayerNorm.weight", "d"),
    "embed.norm.bias": (_EMBED + "LayerNorm.bias", "d"),
    "pool.weight": ("bert.pooler.dense.weight", "w d"),
    "pool.bias": ("bert.pooler.dense.bias", "w"),
}
_HEAD = "cls.predictions."
TOKEN_HEAD: Table = {
    "head.transform.weight": (_HEAD + "transform.dense.weight", "w d"),
    "head.transform.bias": (_HEAD + "transform.dense.bias", "w"),
    "head.norm.scale": (_HEAD + "transform.LayerNorm.weight", "d"),
    "head.norm.bias": (_HEAD + "transform.LayerNorm.bias", "d"),
    "head.bias": (_HEAD + "bias", "v"),
}
CLASS_HEAD: Table = {
    "head.weight": ("classifier.weight", "v d"),
    "head.bias": ("classifier.bias", "v"),
}
_LAYER = "bert.encoder.layer.{layer}."
_SELF = _LAYER + "attention.self."
BLOCKS: Table = {
    **layer_names(_LAYER, _SELF),
    "attention_norm.scale": (_LAYER + "attention.output.LayerNorm.weight", "d"),
    "attention_norm.bias": (_LAYER + "attention.output.LayerNorm.bias", "d"),
    "mlp_norm.scale": (_LAYER + "output.LayerNorm.weight", "d"),
    "mlp_norm.bias": (_LAYER + "output.LayerNorm.bias", "d"),
}
Head = Literal["classes", "tokens", "none"]
_DECODER = _HEAD + "decoder."


def read_config(head: Head, raw: Raw, names: frozenset[str]) -> ModelConfig:
    """Return our config of BERT's; a pooler is kept where the file has one."""
    only(raw, "position_embedding_type", "absolute")
    only(raw, "is_decoder", False)
    only(raw, "add_cross_attention", False)
    if head == "tokens":
        only(raw, "tie_word_embeddings", True)
    width, heads = size(raw, "hidden_size"), size(raw, "num_attention_heads")
    pooled = head == "classes" or any("pooler.dense." in name for name in names)
    return ModelConfig(
        kind="encoder",
        vocab_size=size(raw, "vocab_size"),
        max_seq_len=size(raw, "max_position_embeddings"),
        d_model=width,
        d_ff=size(raw, "intermediate_size"),
        num_layers=size(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=max(width // heads, 1),
        norm="layernorm",
        norm_place="post",
        norm_eps=read(raw, "layer_norm_eps", float, 1e-12),
        embed_norm=True,
        position="learned",
        activation=read_gelu(raw, "hidden_act"),
        use_bias=True,
        token_types=size(raw, "type_vocab_size", 2),
        pooling="tanh" if pooled else "mean",
        encoder_head=head,
        num_classes=read_classes(raw),
    )


def write_config(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of config.json for a model of ours."""
    raw = {
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_seq_len,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "layer_norm_eps": model.norm_eps,
        "hidden_act": write_gelu(model),
        "type_vocab_size": model.token_types,
        "tie_word_embeddings": True,
    }
    return raw | write_classes(model)


def _family(architecture: str, head: Head, outer: Table, **more: Any) -> Family:
    bare = architecture == "BertModel"
    strip = lambda table: {
        ours: (theirs.removeprefix("bert.") if bare else theirs, pattern)
        for ours, (theirs, pattern) in table.items()
    }
    return Family(
        architecture=architecture,
        model_type="bert",
        prefix="" if bare else "bert.",
        read=functools.partial(read_config, head),
        write=write_config,
        outer=strip({**OUTER, **outer}),
        blocks=strip(BLOCKS),
        **more,
    )


_POSITIONS = r"(bert\.)?embeddings\.position_ids"
_TIED = {
    _DECODER + "weight": _EMBED + "word_embeddings.weight",
    _DECODER + "bias": _HEAD + "bias",
}
FAMILIES = (
    _family(
        "BertForMaskedLM",
        "tokens",
        TOKEN_HEAD,
        ignored=(_POSITIONS, r"cls\.seq_relationship\..*"),
        same=_TIED,
    ),
    _family(
        "BertForPreTraining",
        "tokens",
        TOKEN_HEAD,
        ignored=(_POSITIONS, r"cls\.seq_relationship\..*"),
        same=_TIED,
    ),
    _family(
        "BertForSequenceClassification", "classes", CLASS_HEAD, ignored=(_POSITIONS,)
    ),  # fmt: skip
    _family("BertModel", "none", {}, ignored=(_POSITIONS, r"cls\..*")),
)
