"""How large a leak check is: tokens of its probes, a small model like a large one.

Imports no jax.
"""

from __future__ import annotations

import dataclasses

from uoe_jax.config import ModelConfig
from uoe_jax.errors import ConfigError
from uoe_jax.kinds import ATTENTIONS, MLPS, ROUTERS


def check_length(length: int | None, model: ModelConfig) -> None:
    """Raise ConfigError for a length that a model's probes can't have."""
    if length is None:
        return
    if model.kind == "vision":
        raise ConfigError(
            f"length is {length} and model.kind 'vision'; images have a size of "
            "their own, leave it out"
        )
    if not 3 <= length <= model.max_seq_len:
        raise ConfigError(
            f"length is {length}; it must be 3 (a past, a present and a future) to "
            f"{model.max_seq_len}, model.max_seq_len of what is checked"
        )


def probe_length(model: ModelConfig) -> int:
    """Return how many tokens it takes for every router to decide a few times."""
    units = [8]
    for attention, mlp in set(model.layer_kinds):
        units.append(ATTENTIONS[attention].span(model))
        units.append(min(max(model.window), 64))
        for router in (ATTENTIONS[attention].router(model), MLPS[mlp].router(model)):
            if router is not None:
                units.append(ROUTERS[router.router].span(router))
    return 3 * max(units)


def scaled_down(model: ModelConfig) -> ModelConfig:
    """Return a model of the same structure that checks in seconds on a CPU.

    Kept: kinds and their pattern, experts and choices, query groups, heads per expert
    up to 2, patch size, norms, positions, biases. Blocks of block-sparse attention and
    segments of expert selection are at most 8 tokens.
    """
    routed = any(ATTENTIONS[kind].router(model) for kind in model.attention)
    experts = model.union_for("attention").num_experts if routed else 1
    per_expert = min(model.num_kv_heads // experts, 2)
    kv_heads = experts * per_expert
    pattern = max(
        len(model.attention), len(model.mlp), len(model.blocks), len(model.window)
    )
    width = min(model.d_model, 64)
    # Divisible by the union's experts and by the mixture's choices.
    d_ff = 4 * model.union.num_experts * model.moe.top_k
    moe = dataclasses.replace(
        model.moe, d_expert=None if model.moe.d_expert is None else 16
    )
    union, moba = model.union, model.moba
    segment, block = min(union.segment_size, 8), min(moba.block_size, 8)
    return dataclasses.replace(
        model,
        union=dataclasses.replace(union, segment_size=segment),
        moba=dataclasses.replace(moba, block_size=block),
        vocab_size=min(model.vocab_size, 256),
        max_seq_len=min(model.max_seq_len, max(256, 2 * model.union.patch_size)),
        d_model=width,
        d_ff=min(model.d_ff, d_ff),
        num_layers=min(model.num_layers, 2 * pattern),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * model.num_query_groups,
        head_dim=min(model.head_dim, 16),
        window=tuple(min(window, 8) for window in model.window),
        moe=moe,
    )
