"""How large a leak check is: tokens of its probes, a small model like a large one.

Imports no jax.
"""

from __future__ import annotations

import dataclasses

from uoe_jax.config import RANKS, LayerWidths, ModelConfig
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
        if model.head_groups.local:
            units.append(min(model.head_groups.window, 64))
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
    num_layers = min(model.num_layers, 2 * pattern)
    width = min(model.d_model, 64)
    # Divisible by the union's experts and by the mixture's choices.
    d_ff = 4 * model.union.num_experts * model.moe.top_k
    moe = dataclasses.replace(
        model.moe, d_expert=None if model.moe.d_expert is None else 16
    )
    union, moba, groups = model.union, model.moba, model.head_groups
    segment, block = min(union.segment_size, 8), min(moba.block_size, 8)
    return dataclasses.replace(
        model,
        union=dataclasses.replace(union, segment_size=segment),
        moba=dataclasses.replace(moba, block_size=block),
        vocab_size=min(model.vocab_size, 256),
        max_seq_len=min(model.max_seq_len, max(256, 2 * model.union.patch_size)),
        d_model=width,
        d_ff=min(model.d_ff, d_ff),
        num_layers=num_layers,
        num_kv_heads=kv_heads,
        num_heads=kv_heads * model.num_query_groups,
        head_dim=min(model.head_dim, 16),
        window=tuple(min(window, 8) for window in model.window),
        head_groups=dataclasses.replace(groups, window=min(groups.window, 8)),
        moe=moe,
        widths=_scaled_widths(model, width, min(model.d_ff, d_ff), num_layers),
    )


def _scaled_widths(
    model: ModelConfig, width: int, d_ff: int, num_layers: int
) -> LayerWidths:
    """Return the widths of the first layers, in proportion to a small model's.

    Products of low rank have rank 1.
    """
    head = min(model.head_dim, 16)
    union = model.union.num_experts
    share = lambda n, whole, most, step: max(step, n * most // whole // step * step)
    widths: dict[str, tuple[int, ...] | None] = {}
    for name, most, whole, step in (
        ("d_ff", d_ff, model.d_ff, union if "union" in model.mlp else 1),
        ("key_dim", head, model.head_dim, 2),
        ("value_dim", head, model.head_dim, 1),
    ):
        given = getattr(model.widths, name)
        widths[name] = given and tuple(
            share(n, whole, most, step) for n in given[:num_layers]
        )
    small = widths["d_ff"] or (d_ff,) * num_layers
    for name in RANKS.values():
        given = getattr(model.widths, name)
        # A rank of 1 saves something where the matrix has more than 2 rows or columns.
        widths[name] = given and tuple(
            int(rank > 0 and width + wide < width * wide)
            for rank, wide in zip(given, small, strict=False)
        )
    return LayerWidths(**widths)
