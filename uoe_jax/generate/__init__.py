"""Text generation: tokens of arrays of prompts, and texts of a trained run."""

from uoe_jax.generate.many import generate_all
from uoe_jax.generate.sampling import keep_top_k, keep_top_p, sample
from uoe_jax.generate.text import (
    continuation,
    encode_prompt,
    generate_text,
    generate_texts,
    need_decoder,
    stream_text,
)
from uoe_jax.generate.tokens import generate, stream

__all__ = [
    "continuation",
    "encode_prompt",
    "generate",
    "generate_all",
    "generate_text",
    "generate_texts",
    "keep_top_k",
    "keep_top_p",
    "need_decoder",
    "sample",
    "stream",
    "stream_text",
]
