"""Tensors of files into weights of ours: each byte read once, to where it is wanted."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding

from uoe_jax.config import ExperimentConfig, ModelConfig
from uoe_jax.data.progress import progress
from uoe_jax.interop.match import Match
from uoe_jax.interop.names import Source, by_tensor
from uoe_jax.model import param_shapes
from uoe_jax.partition.layout import Layout

Box = tuple[tuple[int, int], ...]  # from and to along every axis of a weight


def read_params(
    files: Any, sources: Sequence[Source], match: Match, model: ModelConfig
) -> dict[str, np.ndarray]:
    """Return all weights of a model by name, in its `param_dtype`.

    Warns of tensors with numbers that aren't finite.
    """
    shapes = param_shapes(model)
    boxes = {name: [_whole(leaf.shape)] for name, leaf in shapes.items()}
    parts = _read_boxes(files, sources, match, model, boxes)
    return {name: parts[name][0] for name in shapes}


def read_onto_mesh(
    files: Any,
    sources: Sequence[Source],
    match: Match,
    config: ExperimentConfig,
    layout: Layout,
) -> dict[str, jax.Array]:
    """Return all weights of a model by name, laid out on a mesh.

    A process reads what its devices hold, each row of a file once, and holds nothing
    else.
    """
    shapes = param_shapes(config.model)
    shardings = {
        name: NamedSharding(layout.mesh, layout.specs[name]) for name in shapes
    }
    places = {
        name: _places(leaf.shape, shardings[name]) for name, leaf in shapes.items()
    }
    boxes = {
        name: list(dict.fromkeys(found.values())) for name, found in places.items()
    }
    parts = _read_boxes(files, sources, match, config.model, boxes)
    arrays: dict[str, jax.Array] = {}
    for name, leaf in shapes.items():
        held = dict(zip(boxes[name], parts.pop(name), strict=True))
        shards = [
            jax.device_put(held[box], device) for device, box in places[name].items()
        ]
        arrays[name] = jax.make_array_from_single_device_arrays(
            leaf.shape, shardings[name], shards
        )
    return arrays


def _places(shape: tuple[int, ...], sharding: Sharding) -> dict[Any, Box]:
    """Return which part of an array each device of this process holds."""
    found = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        spans = [s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True)]
        found[device] = tuple(spans)
    return found


def _whole(shape: tuple[int, ...]) -> Box:
    return tuple((0, size) for size in shape)


class _Piece(NamedTuple):
    """What a box takes of a tensor."""

    source: Source
    part: np.ndarray  # of the box, to fill
    spans: dict[str, tuple[int, int]]  # of each axis of ours that is one letter
    rows: tuple[int, int]


def _read_boxes(
    files: Any,
    sources: Sequence[Source],
    match: Match,
    model: ModelConfig,
    boxes: Mapping[str, Sequence[Box]],
) -> dict[str, list[np.ndarray]]:
    """Return the boxes of every weight, filled."""
    dtype = jnp.dtype(model.param_dtype)
    parts = {
        name: [np.empty([b - a for a, b in box], dtype) for box in group]
        for name, group in boxes.items()
    }
    groups = by_tensor(list(sources))
    order = sorted(groups, key=lambda tensor: match.files[tensor])
    total = sum(a.nbytes for group in parts.values() for a in group)
    broken: list[str] = []
    with progress("reading weights", total) as advance:
        for tensor in order:
            pieces = [
                piece
                for source in groups[tensor]
                for piece in _pieces(source, boxes[source.name], parts[source.name])
            ]
            if not pieces:
                continue
            low = min(piece.rows[0] for piece in pieces)
            high = max(piece.rows[1] for piece in pieces)
            rows = files.read(match.files[tensor], (low, high))
            if not np.isfinite(rows).all():
                broken.append(f"{match.files[tensor]} ({np.sum(~np.isfinite(rows))})")
            for piece in pieces:
                _fill(piece, rows[piece.rows[0] - low : piece.rows[1] - low])
                advance(piece.part.nbytes if not piece.source.index else 0)
    if broken:
        warnings.warn(
            f"{len(broken)} tensors have numbers that aren't finite: "
            f"{', '.join(broken[:6])}; what the model computes won't be either",
            stacklevel=2,
        )
    return parts


def _pieces(
    source: Source, boxes: Sequence[Box], parts: Sequence[np.ndarray]
) -> list[_Piece]:
    """Return what the boxes of a weight take of one of its tensors."""
    found = []
    depth = len(source.index)
    for box, part in zip(boxes, parts, strict=True):
        inside = [a <= i < b for i, (a, b) in zip(source.index, box, strict=False)]
        if not all(inside):
            continue
        place = tuple(i - a for i, (a, _) in zip(source.index, box, strict=False))
        spans = {
            group[0]: span
            for group, span in zip(source.view.ours, box[depth:], strict=True)
            if len(group) == 1
        }
        rows = source.view.rows(spans, source.sizes)
        found.append(_Piece(source, part[place], spans, rows))
    return found


def _fill(piece: _Piece, rows: np.ndarray) -> None:
    source = piece.source
    weight = source.view.to_ours(rows, source.sizes)
    index = []
    for group, have in zip(source.view.ours, weight.shape, strict=True):
        low, high = (
            piece.spans.get(group[0], (0, have)) if len(group) == 1 else (0, have)
        )
        # Rows that were left out when reading are left out already.
        index.append(slice(None) if high - low == have else slice(low, high))
    piece.part[...] = weight[tuple(index)]
