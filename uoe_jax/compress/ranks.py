"""A model whose MLP matrices are products of low rank: of one rank, or by curves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from uoe_jax.compress.allocate import Part, by_curve, candidates, check_cut
from uoe_jax.compress.channels import Layer, as_before
from uoe_jax.compress.low_rank import (
    LowRank,
    break_even,
    by_outputs,
    by_weights,
    check_rank,
)
from uoe_jax.compress.observed import Observed, Smaller, block_params
from uoe_jax.compress.options import Compress
from uoe_jax.compress.statistics import LayerStatistics
from uoe_jax.config import RANKS, LayerWidths, ModelConfig
from uoe_jax.errors import ConfigError
from uoe_jax.model.stacks import from_layers
from uoe_jax.tree import Arrays

_BIASES = {"w_up": "b_up", "w_gate": "b_gate", "w_down": "b_down"}


def prepare_ranks(observed: Observed, method: str) -> Callable[[Compress], Smaller]:
    """Return what makes a model of any rank: every matrix is factored once.

    Raises ConfigError for a model with MLPs that aren't dense.
    """
    check_dense(observed.model, method)
    pairs = list(zip(observed.layers, observed.seen, strict=True))
    factors = [_factors(layer, seen, method) for layer, seen in pairs]

    def parts(multiple: int) -> list[Part]:
        return [
            part
            for number, (layer, seen) in enumerate(pairs)
            for part in rank_parts(number, layer, factors[number], seen, multiple)
        ]

    def cut(options: Compress) -> Smaller:
        if options.spread == "curve":
            ranks = ranks_by_curve(
                observed.model, parts, options.cut or 0.0, options.way().multiple
            )
            return _with_ranks(observed, factors, ranks)
        rank = one_rank(observed.model, options)
        same = {name: (rank,) * len(factors) for name in factors[0]}
        return _with_ranks(observed, factors, same)

    return cut


def check_dense(model: ModelConfig, method: str) -> None:
    """Raise ConfigError for a model with MLPs that aren't dense."""
    for number, (_, mlp) in enumerate(model.layer_kinds):
        if mlp != "dense":
            raise ConfigError(
                f"layer {number} has mlp {mlp}; method {method} takes dense MLPs, use "
                "another --method"
            )


def one_rank(model: ModelConfig, options: Compress) -> int:
    """Return the rank of all MLP matrices, given or by the cut.

    Raises ConfigError for one that saves no parameters, or a cut that MLPs haven't got.
    """
    rank = options.rank
    if rank is None:
        rank = uniform_rank(model, options.cut or 0.0)
    check_rank(rank, model.d_model, model.d_ff, "mlp.w_up")
    return rank


def rank_parts(
    number: int,
    layer: Layer,
    factors: Mapping[str, LowRank],
    seen: LayerStatistics,
    multiple: int,
) -> Iterator[Part]:
    """Yield the ranks that a layer's matrices may have, and their errors.

    Ranks are multiples, and the largest that saves anything.
    They are of the MLP's output over the residual's energy. A matrix that goes to
    neurons is taken to lose the share of the output that it loses of its own.
    """
    tokens = max(float(seen.tokens), 1.0)
    w_down = layer["mlp.w_down"][0].astype(np.float64)
    moment = seen.neurons[0].astype(np.float64) / tokens
    written = float(np.sum(moment * (w_down @ w_down.T))) / seen.residual_square
    for name, factor in factors.items():
        rows, columns = layer[f"mlp.{name}"].shape[1:]
        most = math.ceil(break_even(rows, columns)) - 1
        ranks = candidates(most, multiple)
        errors, whole = factor.errors(), min(rows, columns)
        yield Part(
            number,
            name,
            np.append(ranks, whole),
            np.append(errors[ranks] / max(errors[0], 1e-300) * written, 0.0),
            np.append(ranks * (rows + columns), rows * columns).astype(float),
        )


def ranks_by_curve(
    model: ModelConfig,
    parts_of: Callable[[int], Sequence[Part]],
    cut: float,
    multiple: int,
) -> dict[str, tuple[int, ...]]:
    """Return each matrix's ranks by layer, 0: whole, of least error in all at a cut.

    `parts_of` a multiple are the MLPs' matrices. Raises ConfigError for a cut that they
    haven't got.
    """
    parts, blocks = parts_of(multiple), block_params(model)
    whole = sum(float(part.costs[-1]) for part in parts)
    check_cut(parts, cut, float(blocks), lambda: parts_of(1))
    chosen = by_curve(parts, whole - cut * blocks)
    found: dict[str, list[int]] = {}
    for part, rank in zip(parts, chosen, strict=True):
        low = int(rank) if rank < part.widths[-1] else 0
        found.setdefault(part.name, []).append(low)
    return {name: tuple(ranks) for name, ranks in found.items()}


def uniform_rank(model: ModelConfig, cut: float) -> int:
    """Return the largest rank of all MLP matrices that cuts a share of the blocks.

    Raises ConfigError for a cut that the MLPs haven't got.
    """
    d, f = model.d_model, model.d_ff
    matrices = model.num_layers * (3 if model.gated else 2)
    mlps, blocks = matrices * d * f, block_params(model)
    rank = math.floor((1 - cut * blocks / mlps) * break_even(d, f))
    if rank < 1:
        raise ConfigError(
            f"cut is {cut:g}; with only its MLPs of low rank a model loses less than "
            f"{mlps / blocks:.3g} of its blocks, cut less"
        )
    return rank


def _factors(layer: Layer, seen: LayerStatistics, method: str) -> dict[str, LowRank]:
    """Return the factors of a dense MLP's matrices, the best ranks first."""
    tokens = max(float(seen.tokens), 1.0)
    inputs = (seen.mlp_input / tokens, seen.mlp_mean / tokens)
    hidden = (seen.neurons[0] / tokens, seen.neurons_mean[0] / tokens)
    found = {}
    for name in RANKS:
        weight = layer.get(f"mlp.{name}")
        if weight is None:
            continue
        if method == "svd":
            found[name] = by_weights(weight[0])
            continue
        moment, mean = hidden if name == "w_down" else inputs
        bias = _bias(layer, name)
        found[name] = by_outputs(moment, weight[0], mean, bias)
    return found


def _bias(layer: Layer, name: str) -> Any:
    bias = layer.get(f"mlp.{_BIASES[name]}")
    return None if bias is None else bias.reshape(-1).astype(np.float64)


def _with_ranks(
    observed: Observed,
    factors: list[dict[str, LowRank]],
    ranks: Mapping[str, Sequence[int]],
) -> Smaller:
    new = []
    for number, (layer, own) in enumerate(zip(observed.layers, factors, strict=True)):
        kept: Arrays = dict(layer)
        for name, factor in own.items():
            if not (rank := ranks[name][number]):
                continue
            weight = kept.pop(f"mlp.{name}")
            first, second = factor.into[:, :rank], factor.out[:rank]
            kept[f"mlp.{name}_a"] = first[None].astype(weight.dtype)
            kept[f"mlp.{name}_b"] = second[None].astype(weight.dtype)
            bias = _bias(layer, name)
            if bias is not None:
                key = f"mlp.{_BIASES[name]}"
                shifted = factor.bias(rank, bias).reshape(layer[key].shape)
                kept |= as_before({key: shifted}, layer)
        new.append(kept)
    model = observed.model
    given = {RANKS[name]: tuple(own) for name, own in ranks.items() if any(own)}
    config = dataclasses.replace(model, widths=LayerWidths(**given))
    params = from_layers(observed.rest, new, config)
    return Smaller(config, params, from_layers({}, observed.buffers, config))
