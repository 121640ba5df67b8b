"""What can't be of layers that are narrower than their model. Imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from uoe_jax.config import RANKS, LayerWidths, ModelConfig


def width_problems(model: ModelConfig) -> Iterator[str]:
    """Yield each broken rule of a model's widths as "value, rule, fix"."""
    widths = model.widths
    if widths == LayerWidths():
        return
    short = list(_lengths(model))
    yield from short
    if short:  # the other rules are about layers
        return
    yield from _attention(model)
    yield from _neurons(model)
    yield from _ranks(model)


def _lengths(model: ModelConfig) -> Iterator[str]:
    for field in dataclasses.fields(LayerWidths):
        given = getattr(model.widths, field.name)
        if given is not None and len(given) != model.num_layers:
            yield (
                f"model.widths.{field.name} has {len(given)} numbers for "
                f"{model.num_layers} layers; give one a layer, or None"
            )


def _attention(model: ModelConfig) -> Iterator[str]:
    widths = model.widths
    for name in ("key_dim", "value_dim"):
        given = getattr(widths, name)
        if given is None:
            continue
        yield from _too_wide(name, given, "head_dim", model.head_dim)
        narrow = [n for n, width in enumerate(given) if width != model.head_dim]
        kinds = sorted({model.layer_kinds[n][0] for n in narrow} - {"dense"})
        if kinds:
            yield (
                f"model.widths.{name} is set with {kinds[0]!r} attention; only dense "
                f"attention has narrow heads, give {model.head_dim} there"
            )
        if "mod" in {model.block_kinds[n] for n in narrow}:
            yield (
                f"model.widths.{name} is set with 'mod' blocks, which have whole heads "
                f"only; give {model.head_dim} there"
            )
    if widths.key_dim is None:
        return
    odd = [n for n in widths.key_dim if n % 2]
    if model.rotates and odd:
        yield (
            f"model.widths.key_dim has {odd[0]}; pairs are rotated, use an even width, "
            f"such as {odd[0] + 1}"
        )
    if model.qk_norm:
        yield (
            "model.widths.key_dim is set with model.qk_norm, which divides by the root "
            "mean square of a whole head; leave it None"
        )


def _neurons(model: ModelConfig) -> Iterator[str]:
    given = model.widths.d_ff
    if given is None:
        return
    yield from _too_wide("d_ff", given, "d_ff", model.d_ff)
    kinds = [mlp for _, mlp in model.layer_kinds]
    other = sorted(set(kinds) - {"dense", "union"})
    if other:
        yield (
            f"model.widths.d_ff is set with {other[0]!r} MLPs; dense ones and unions "
            "have widths of their own, leave it None"
        )
    experts = model.union.num_experts
    uneven = [n for n, kind in zip(given, kinds, strict=True) if kind == "union"]
    uneven = [n for n in uneven if n % experts]
    if uneven:
        below, above = uneven[0] // experts * experts, -(-uneven[0] // experts)
        near = f"{below} or {above * experts}" if below else f"{above * experts}"
        yield (
            f"model.union.num_experts {experts} doesn't divide {uneven[0]} of "
            f"model.widths.d_ff; use {near}"
        )


def _ranks(model: ModelConfig) -> Iterator[str]:
    for weight, name in RANKS.items():
        given = getattr(model.widths, name)
        if not given or not any(given):
            continue
        if weight == "w_gate" and not model.gated:
            yield (
                f"model.widths.{name} is set and model.activation "
                f"{model.activation!r} has no gate; leave it None"
            )
            continue
        for layer, rank in enumerate(given):
            if rank and (problem := _rank(model, layer, name, rank)):
                yield problem
                break


def _rank(model: ModelConfig, layer: int, name: str, rank: int) -> str | None:
    kind = model.layer_kinds[layer][1]
    if kind != "dense":
        return (
            f"model.widths.{name} has {rank} for layer {layer}, whose MLP is "
            f"{kind!r}; only dense MLPs have low rank, use 0"
        )
    wide = model.of_layer(layer).d_ff
    if rank * (model.d_model + wide) >= model.d_model * wide:
        most = (model.d_model * wide - 1) // (model.d_model + wide)
        return (
            f"model.widths.{name} has {rank} for layer {layer}, a matrix of "
            f"{model.d_model} and {wide}: a rank above {most} saves nothing; lower it, "
            "or use 0 for the whole matrix"
        )
    return None


def _too_wide(
    name: str, given: tuple[int, ...], field: str, most: int
) -> Iterator[str]:
    if max(given) > most:
        yield (
            f"model.widths.{name} has {max(given)} and model.{field} is {most}; layers "
            "are narrower than the model, not wider"
        )
