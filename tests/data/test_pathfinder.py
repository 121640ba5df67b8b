"""Pathfinder: scenes follow the rules, and the label is what the picture shows."""

import numpy as np
import pytest

from tests.compare import assert_close
from uoe_jax.data.tasks import parallel, pathfinder
from uoe_jax.data.tasks.pathfinder import PathfinderRules, generate, make_scenes
from uoe_jax.errors import DataError

RULES = PathfinderRules(contour_length=6)


@pytest.fixture(scope="module")
def scenes():
    return make_scenes([5, 0], RULES)


def between(a, b):
    """Least distance of two dashes, by points along both."""
    along = np.linspace(0, 1, 41)[:, None]
    p, q = (d[0] + along * (d[1] - d[0]) for d in (a, b))
    return np.sqrt(((p[:, None] - q[None]) ** 2).sum(-1)).min()


def connected(dashes, start, end, reach):
    """Whether a walk over gaps up to `reach` leads from one point to the other."""
    known = [d for d in dashes if not np.isnan(d).any()]
    touches = lambda point: [
        i for i, d in enumerate(known) if min(abs(d - point).sum(axis=1)) < 1e-9
    ]
    reached, waiting = set(), touches(start)
    while waiting:
        i = waiting.pop()
        if i not in reached:
            reached.add(i)
            waiting += [
                j for j in range(len(known)) if between(known[i], known[j]) <= reach
            ]
    return bool(reached & set(touches(end)))


def test_circles_are_connected_exactly_where_the_label_says(scenes):
    assert len(scenes.labels) >= 20
    for n in range(20):
        found = connected(
            scenes.dashes[n], *scenes.circles[n], reach=2 * RULES.margin + 1e-6
        )
        assert found == bool(scenes.labels[n])


def test_dashes_have_their_length_and_stay_inside(scenes):
    steps = scenes.paths[..., 1, :] - scenes.paths[..., 0, :]
    assert_close(np.linalg.norm(steps, axis=-1), RULES.dash, 1e-6)
    assert scenes.paths.min() >= RULES.padding - 0.5
    assert scenes.paths.max() <= RULES.side - RULES.padding + 0.5
    starts = scenes.paths[:, :, 0, 0]
    apart = np.linalg.norm(starts[:, 0] - starts[:, 1], axis=-1)
    assert_close(apart, RULES.seed_distance, 1e-6)
    gaps = scenes.paths[:, :, 1:, 0] - scenes.paths[:, :, :-1, 1]
    assert np.linalg.norm(gaps, axis=-1).max() <= 2 * RULES.margin + 1e-9


def test_half_of_the_labels_are_one(scenes):
    assert scenes.labels.mean() == 0.5


def test_images_are_grey_and_more_of_them_begin_with_the_same():
    few, few_labels = generate(6, 1, RULES)
    many, labels = generate(pathfinder._SCENES + 1, 1, RULES)  # over several chunks
    assert few.shape == (6, 32, 32, 1) and few.dtype == np.uint8
    assert np.array_equal(few, many[:6]) and np.array_equal(few_labels, labels[:6])
    assert np.array_equal(labels, np.arange(len(labels)) % 2)
    assert (few == 255).sum(axis=(1, 2, 3)).min() >= 8  # the two circles
    assert ((few > 0).mean(axis=(1, 2, 3)) < 0.6).all()
    assert len({image.tobytes() for image in many}) == len(many)


def test_processes_make_the_same_images(monkeypatch):
    alone, labels = generate(60, 3)  # of two chunks
    monkeypatch.setattr(pathfinder, "_WORTH_PROCESSES", 1)
    monkeypatch.setattr(pathfinder.os, "cpu_count", lambda: 2)
    together, same = generate(60, 3)
    assert np.array_equal(alone, together) and np.array_equal(labels, same)


def test_a_process_that_ends_is_noticed():
    with (
        pytest.raises(DataError, match="run the same command again"),
        parallel.chunks(0, RULES._replace(contour_length="six"), 1) as made,
    ):
        next(made)


def test_paths_that_find_no_room_say_so(monkeypatch):
    monkeypatch.setattr(pathfinder, "_SCENES", 8)
    monkeypatch.setattr(pathfinder, "_DRY_CHUNKS", 2)
    with pytest.raises(DataError, match="use shorter paths"):
        generate(2, 0, PathfinderRules(contour_length=60))
