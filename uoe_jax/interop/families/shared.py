"""What the files of encoders share: names of a layer's weights, gelu, classes."""

from __future__ import annotations

from typing import Any

from uoe_jax.config import ModelConfig
from uoe_jax.interop.families.fields import Raw, only, size
from uoe_jax.interop.names import Table

_GELU = ("gelu_new", "gelu_pytorch_tanh")  # by tanh; "gelu" is exact


def layer_names(layer: str, attention: str) -> Table:
    """Return the names of a layer's projections, without its norms.

    `layer` begins all names, `attention` those of queries, keys and values.
    """
    return {
        "attention.wq": (attention + "query.weight", "(j g h) d"),
        "attention.wk": (attention + "key.weight", "(j h) d"),
        "attention.wv": (attention + "value.weight", "(j h) d"),
        "attention.bq": (attention + "query.bias", "(j g h)"),
        "attention.bk": (attention + "key.bias", "(j h)"),
        "attention.bv": (attention + "value.bias", "(j h)"),
        "attention.wo": (layer + "attention.output.dense.weight", "d (j g h)"),
        "attention.bo": (layer + "attention.output.dense.bias", "d"),
        "mlp.w_up": (layer + "intermediate.dense.weight", "f d"),
        "mlp.b_up": (layer + "intermediate.dense.bias", "f"),
        "mlp.w_down": (layer + "output.dense.weight", "d f"),
        "mlp.b_down": (layer + "output.dense.bias", "d"),
    }


def read_gelu(raw: Raw, name: str, usual: str = "gelu") -> Any:
    """Return our name of a gelu; `usual` is what a config without one means."""
    others = [word for word in ("gelu", *_GELU) if word != usual]
    return "gelu_erf" if only(raw, name, usual, *others) == "gelu" else "gelu"


def write_gelu(model: ModelConfig) -> str:
    """Return a config.json's name of a model's gelu."""
    return "gelu" if model.activation == "gelu_erf" else "gelu_new"


def read_classes(raw: Raw) -> int:
    """Return the number of classes: of their names, where these are given."""
    named = raw.get("id2label")
    count = len(named) if isinstance(named, dict) and named else 2
    return size(raw, "num_labels", count)


def write_classes(model: ModelConfig) -> dict[str, Any]:
    """Return names of classes for a config.json."""
    return {
        "id2label": {str(i): f"LABEL_{i}" for i in range(model.num_classes)},
        "label2id": {f"LABEL_{i}": i for i in range(model.num_classes)},
    }
