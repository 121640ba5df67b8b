"""Pathfinder: are two circles the ends of one dashed path?

Linsley et al. 2018; sizes as in the Long Range Arena's pathfinder32 (Tay et al. 2020):
two paths of equal length that start near each other, shorter paths that distract, and
a circle at the start of a path and at the end of the same (label 1) or the other one.
Coordinates are (y, x) in pixels; pixel i covers i to i + 1.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from uoe_jax.data.tasks.render import distance_to_dash, draw, inside, window_of
from uoe_jax.errors import DataError

_SCENES = 512  # tried at once; part of what a seed means
_WORTH_PROCESSES = 2000  # images
_DRY_CHUNKS = 40  # without a scene: there are none
_CANDIDATES = 64  # directions tried for the next dash of a path
_SEEDS = 32  # places tried for the first dash of a distractor
_TRIALS = 5  # attempts at one distractor; then it is left out
_CELLS = 2  # grid cells a pixel, a side
_STAGES = (4, 16)  # of a dash's candidates, tried before the rest
_PROBES = np.linspace(0.0, 1.75, 8)[:, None, None]  # along a candidate, in lengths


class PathfinderRules(NamedTuple):
    """How scenes are drawn; lengths in pixels but for those counted in dashes."""

    side: int = 32
    contour_length: int = 14  # dashes of each of the two paths
    dash: float = 2.0
    margin: float = 1.0  # half of the gap between dashes
    padding: float = 1.0  # border that stays free
    seed_distance: float = 7.0  # between the starts of the two paths
    continuity: float = 1.0  # turns are drawn from cos^2(continuity * angle)

    @property
    def distractor_length(self) -> int:
        """Dashes of a distractor."""
        return self.contour_length // 3

    @property
    def num_distractors(self) -> int:
        """Distractors that are tried; where there is no room, fewer are drawn."""
        return 20 // self.distractor_length

    @property
    def clearance(self) -> float:
        """Least distance between dashes that aren't neighbours on one path.

        More than the gap between neighbours, so that a path can be told by distances.
        """
        # The probes of a dash are half a pixel apart and are rounded to grid cells.
        return 2 * self.margin + self.dash / 8 + 0.5**0.5 / _CELLS


PUBLISHED = PathfinderRules()


class Scenes(NamedTuple):
    """Dashes (tail, head) of both paths and of the distractors, and the circles."""

    paths: Float[np.ndarray, "N 2 L 2 2"]
    distractors: Float[np.ndarray, "N P 2 2"]  # NaN where there was no room
    circles: Float[np.ndarray, "N 2 2"]
    labels: Int[np.ndarray, " N"]

    @property
    def dashes(self) -> Float[np.ndarray, "N P 2 2"]:
        """Every dash of a scene."""
        count, snakes, length = self.paths.shape[:3]
        flat = self.paths.reshape(count, snakes * length, 2, 2)
        return np.concatenate([flat, self.distractors], axis=1)


def generate(
    count: int,
    seed: int,
    rules: PathfinderRules = PUBLISHED,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[UInt8[np.ndarray, "N Hi Wi 1"], Int[np.ndarray, " N"]]:
    """Return images and labels; every other label is 1.

    The first scenes of a seed are the same for every count.
    """
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    done = dry = 0
    with _chunks(count, seed, rules) as chunks:
        for number, (drawn, own_labels) in enumerate(chunks):
            dry = 0 if len(drawn) else dry + 1
            if dry == _DRY_CHUNKS:
                raise DataError(
                    f"Pathfinder found no scene with paths of {rules.contour_length} "
                    f"dashes on {rules.side} pixels in {number + 1} x {_SCENES} "
                    "attempts; use shorter paths"
                )
            images.append(drawn)
            labels.append(own_labels)
            done += len(drawn)
            advance(len(drawn))
            if done >= count:
                break
    joined = np.concatenate(images)[:count, :, :, None]
    return joined, np.concatenate(labels)[:count].astype(np.int32)


def _chunks(
    count: int, seed: int, rules: PathfinderRules
) -> AbstractContextManager[Iterator[tuple[np.ndarray, np.ndarray]]]:
    """Return images and labels by chunk, made by all processors if they are many."""
    if count > _WORTH_PROCESSES:
        from uoe_jax.data.tasks.parallel import chunks

        return chunks(seed, rules, min(os.cpu_count() or 1, 32))
    numbers = itertools.count()
    return nullcontext(make_chunk([seed, number], rules) for number in numbers)


def make_chunk(
    seed: list[int], rules: PathfinderRules
) -> tuple[UInt8[np.ndarray, "N Hi Wi"], Int[np.ndarray, " N"]]:
    """Return the images and labels of a chunk."""
    scenes = make_scenes(seed, rules)
    return draw(scenes.dashes, scenes.circles, rules.side), scenes.labels


def make_scenes(seed: list[int], rules: PathfinderRules) -> Scenes:
    """Return the scenes of a chunk that had room, as many of label 0 as of 1."""
    rng = np.random.default_rng(seed)
    paths, grid = _grow_paths(rng, rules)
    count = len(paths) // 2 * 2
    paths, grid = paths[:count], grid[:count]
    distractors = _add_distractors(rng, grid, rules)
    labels = np.arange(count) % 2
    origin = rng.integers(0, 2, count)
    row = np.arange(count)
    circles = np.stack(
        [
            paths[row, origin, 0, 0],
            paths[row, np.where(labels == 1, origin, 1 - origin), -1, 1],
        ],
        axis=1,
    )
    return Scenes(paths, distractors, circles, labels)


def _grow_paths(
    rng: np.random.Generator, rules: PathfinderRules
) -> tuple[Float[np.ndarray, "N 2 L 2 2"], Bool[np.ndarray, "N G G"]]:
    """Return the two paths of every scene that has room for them, and its grid."""
    size = rules.side * _CELLS
    grid = np.ones((_SCENES, size, size), bool)
    inner = slice(round(rules.padding * _CELLS), -round(rules.padding * _CELLS))
    grid[:, inner, inner] = False
    low, high = 2 * rules.seed_distance, rules.side - 2 * rules.seed_distance
    starts = [rng.uniform(low, high, (_SCENES, 2))]
    angle = rng.uniform(-np.pi, np.pi, _SCENES)
    starts.append(starts[0] + rules.seed_distance * _unit(angle))
    paths = np.zeros((_SCENES, 2, rules.contour_length, 2, 2))
    for dash in range(rules.contour_length):
        for snake in (0, 1):
            if dash == 0:
                headings = rng.uniform(-np.pi, np.pi, (len(grid), _CANDIDATES))
                tails = np.repeat(starts[snake][:, None], _CANDIDATES, axis=1)
            else:
                tails, headings = _continue(rng, paths[:, snake, dash - 1], rules)
            # The other path's newest dash isn't in the grid yet.
            recent = paths[:, 1, dash - 1 : dash] if snake == 0 else paths[:, 0, [dash]]
            made, found = _first_free(grid, tails, headings, recent, rules)
            paths[:, snake, dash] = made
            grid, paths = grid[found], paths[found]
            starts = [s[found] for s in starts]
            if dash:
                _block(grid, paths[:, snake, dash - 1], rules)
    for snake in (0, 1):
        _block(grid, paths[:, snake, -1], rules)
    return paths, grid


def _add_distractors(
    rng: np.random.Generator, grid: Bool[np.ndarray, "N G G"], rules: PathfinderRules
) -> Float[np.ndarray, "N P 2 2"]:
    """Return the distractors' dashes, NaN where there was no room."""
    count, length = len(grid), rules.distractor_length
    dashes = np.full((count, rules.num_distractors, length, 2, 2), np.nan)
    for number in range(rules.num_distractors):
        left = np.arange(count)
        for _ in range(_TRIALS):
            rows, made = _grow_distractor(rng, grid, left, rules)
            dashes[rows, number] = made
            left = np.setdiff1d(left, rows)
            for dash in range(length):
                blocked = grid[rows]
                _block(blocked, made[:, dash], rules)
                grid[rows] = blocked
    return dashes.reshape(count, rules.num_distractors * length, 2, 2)


def _grow_distractor(
    rng: np.random.Generator,
    grid: Bool[np.ndarray, "N G G"],
    rows: Int[np.ndarray, " R"],
    rules: PathfinderRules,
) -> tuple[Int[np.ndarray, " S"], Float[np.ndarray, "S L 2 2"]]:
    """Return the rows where one attempt at a distractor succeeded, and its dashes."""
    made = np.zeros((len(rows), rules.distractor_length, 2, 2))
    for dash in range(rules.distractor_length):
        if dash == 0:
            shape = (len(rows), _SEEDS)
            tails = rng.uniform(0, rules.side, (*shape, 2))
            headings = rng.uniform(-np.pi, np.pi, shape)
        else:
            tails, headings = _continue(rng, made[:, dash - 1], rules)
        own = made[:, : max(dash - 1, 0)]
        new, found = _first_free(grid[rows], tails, headings, own, rules)
        made[:, dash] = new
        made, rows = made[found], rows[found]
    return rows, made


def _continue(
    rng: np.random.Generator, dash: Float[np.ndarray, "N 2 2"], rules: PathfinderRules
) -> tuple[Float[np.ndarray, "N K 2"], Float[np.ndarray, "N K"]]:
    """Return candidates for the dash after this one: tails and headings.

    The path goes on for a margin, turns, and leaves another margin before the dash.
    """
    step = dash[:, 1] - dash[:, 0]
    heading = np.arctan2(step[:, 0], step[:, 1])
    pivot = dash[:, 1] + rules.margin * _unit(heading)
    widest = min(np.pi / 2 / rules.continuity, np.pi)
    angles = np.linspace(-widest, widest, 181)
    weights = np.cumsum(np.cos(rules.continuity * angles) ** 2)
    draws = rng.uniform(weights[0], weights[-1], (len(dash), _CANDIDATES))
    headings = heading[:, None] + np.interp(draws, weights, angles)
    return pivot[:, None] + rules.margin * _unit(headings), headings


def _first_free(
    grid: Bool[np.ndarray, "N G G"],
    tails: Float[np.ndarray, "N K 2"],
    headings: Float[np.ndarray, "N K"],
    recent: Float[np.ndarray, "N J 2 2"],
    rules: PathfinderRules,
) -> tuple[Float[np.ndarray, "N 2 2"], Bool[np.ndarray, " N"]]:
    """Return the first candidate dash that is clear of grid and recent dashes.

    The second value says where there was one.
    """
    heads = tails + rules.dash * _unit(headings)
    choice = np.zeros(len(grid), np.int64)
    found = np.zeros(len(grid), bool)
    # Most rows take one of their first candidates, so the others are looked at late.
    for first, last in itertools.pairwise((0, *_STAGES, tails.shape[1])):
        left = np.flatnonzero(~found)
        if not len(left) or first >= last:
            continue
        tail, head = (a[left, first:last] for a in (tails, heads))
        free = _is_free(grid, left, tail, head, recent[left], rules)
        choice[left] = first + free.argmax(axis=1)
        found[left] = free.any(axis=1)
    row = np.arange(len(grid))
    return np.stack([tails[row, choice], heads[row, choice]], axis=1), found


def _is_free(
    grid: Bool[np.ndarray, "N G G"],
    rows: Int[np.ndarray, " R"],
    tails: Float[np.ndarray, "R K 2"],
    heads: Float[np.ndarray, "R K 2"],
    recent: Float[np.ndarray, "R J 2 2"],
    rules: PathfinderRules,
) -> Bool[np.ndarray, "R K"]:
    """Return which dashes are clear of some rows' grids and recent dashes."""
    size = grid.shape[1]
    y, x = (tails[..., i] + _PROBES * (heads[..., i] - tails[..., i]) for i in (0, 1))
    row, column = (np.floor(a * _CELLS).astype(np.int64) for a in (y, x))
    # Below zero is far above as an unsigned number: one comparison for both ends.
    taken = np.maximum(row.view(np.uint64), column.view(np.uint64)) >= size
    cell = (rows * size * size)[None, :, None] + row * size + column
    cell[taken] = 0
    taken |= grid.reshape(-1)[cell]
    free = ~taken.any(axis=0)
    for dash in recent.transpose(1, 0, 2, 3):
        # A candidate is an axis of its own there, as windows have two.
        near = distance_to_dash(y[..., None], x[..., None], dash) <= rules.clearance
        free &= ~near.any(axis=(0, 3))
    return free


def _block(
    grid: Bool[np.ndarray, "N G G"],
    dash: Float[np.ndarray, "N 2 2"],
    rules: PathfinderRules,
) -> None:
    """Mark the cells of the grid that are too near a dash."""
    size = grid.shape[1]
    reach = int(np.ceil((rules.dash / 2 + rules.clearance) * _CELLS)) + 1
    y, x = window_of(dash.mean(axis=1) * _CELLS, reach)
    near = distance_to_dash((y + 0.5) / _CELLS, (x + 0.5) / _CELLS, dash)
    row, i, j = np.nonzero((near <= rules.clearance) & inside(y, x, size))
    grid[row, y[row, i, 0].astype(np.int64), x[row, 0, j].astype(np.int64)] = True


def _unit(heading: Float[np.ndarray, "*N"]) -> Float[np.ndarray, "*N 2"]:
    return np.stack([np.sin(heading), np.cos(heading)], axis=-1)
