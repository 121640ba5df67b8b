"""Text generation: tokens of arrays of prompts, and texts of a trained run."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uoe_jax.generate.drawing import keep_top_k, keep_top_p, sample
    from uoe_jax.generate.many import generate_all, generate_each
    from uoe_jax.generate.sampling import Sampling
    from uoe_jax.generate.text import (
        continuation,
        encode_prompt,
        generate_text,
        generate_texts,
        need_decoder,
        stream_reply,
        stream_text,
    )
    from uoe_jax.generate.tokens import generate, stream

__all__ = [
    "Sampling",
    "continuation",
    "encode_prompt",
    "generate",
    "generate_all",
    "generate_each",
    "generate_text",
    "generate_texts",
    "keep_top_k",
    "keep_top_p",
    "need_decoder",
    "sample",
    "stream",
    "stream_reply",
    "stream_text",
]

_FILES = {
    "drawing": ("keep_top_k", "keep_top_p", "sample"),
    "many": ("generate_all", "generate_each"),
    "sampling": ("Sampling",),
    "text": (
        "continuation",
        "encode_prompt",
        "generate_text",
        "generate_texts",
        "need_decoder",
        "stream_reply",
        "stream_text",
    ),
    "tokens": ("generate", "stream"),
}
_FILE = {name: file for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: options are read without jax."""
    if name not in _FILE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILE[name]}"), name)
