"""ViT: patches of an image, a class token before them, pre-norm."""

from __future__ import annotations

from typing import Any

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

_EMBED = "vit.embeddings."
OUTER: Table = {
    "embed.class_token": (_EMBED + "cls_token", "0/1 0/1 d"),
    "embed.position.embedding": (_EMBED + "position_embeddings", "0/1 t d"),
    # Their kernel is flattened by channel, row and column, ours by row first.
    "embed.weight": (
        _EMBED + "patch_embeddings.projection.weight",
        "d c y x > (y x c) d",
    ),
    "embed.bias": (_EMBED + "patch_embeddings.projection.bias", "d"),
    "trunk.norm.scale": ("vit.layernorm.weight", "d"),
    "trunk.norm.bias": ("vit.layernorm.bias", "d"),
    "head.weight": ("classifier.weight", "v d"),
    "head.bias": ("classifier.bias", "v"),
}
_LAYER = "vit.encoder.layer.{layer}."
_SELF = _LAYER + "attention.attention."
BLOCKS: Table = {
    "attention_norm.scale": (_LAYER + "layernorm_before.weight", "d"),
    "attention_norm.bias": (_LAYER + "layernorm_before.bias", "d"),
    "mlp_norm.scale": (_LAYER + "layernorm_after.weight", "d"),
    "mlp_norm.bias": (_LAYER + "layernorm_after.bias", "d"),
    **layer_names(_LAYER, _SELF),
}


def read_config(raw: Raw, names: frozenset[str]) -> ModelConfig:
    """Return our config of ViT's."""
    del names
    only(raw, "qkv_bias", True)
    width, heads = size(raw, "hidden_size"), size(raw, "num_attention_heads")
    side, patch = size(raw, "image_size", 224), size(raw, "patch_size", 16)
    return ModelConfig(
        kind="vision",
        max_seq_len=(side // patch) ** 2 + 1,
        d_model=width,
        d_ff=size(raw, "intermediate_size"),
        num_layers=size(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=max(width // heads, 1),
        norm="layernorm",
        norm_eps=read(raw, "layer_norm_eps", float, 1e-12),
        position="learned",
        activation=read_gelu(raw, "hidden_act"),
        use_bias=True,
        class_token=True,
        pooling="first",
        num_classes=read_classes(raw),
        image_size=side,
        image_channels=size(raw, "num_channels", 3),
        image_patch=patch,
    )


def write_config(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of config.json for a model of ours."""
    raw = {
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "layer_norm_eps": model.norm_eps,
        "hidden_act": write_gelu(model),
        "image_size": model.image_size,
        "patch_size": model.image_patch,
        "num_channels": model.image_channels,
        "qkv_bias": True,
    }
    return raw | write_classes(model)


FAMILIES = (
    Family(
        architecture="ViTForImageClassification",
        model_type="vit",
        prefix="vit.",
        read=read_config,
        write=write_config,
        outer=OUTER,
        blocks=BLOCKS,
        ignored=(r"vit\.pooler\..*",),
    ),
)
