"""PPP: the number of clusters, and labels that nothing but the points decides."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture

from tests.compare import assert_close
from uoe_jax.cluster.kmeans import Split, lloyd, nearest
from uoe_jax.cluster.metrics import adjusted_rand
from uoe_jax.cluster.mixture import grow_mixture
from uoe_jax.cluster.ppp import PPP
from uoe_jax.cluster.prepare import canonical_order, coreset, make_frame
from uoe_jax.errors import ConfigError, DataError

SPREAD = 0.08  # deviation of the points around a centre


def blobs(seed, clusters=4, width=2, count=400, spread=SPREAD):
    """Points around centres that are at least 10 deviations apart."""
    draw = np.random.default_rng(seed)
    centres = np.zeros((0, width))
    while len(centres) < clusters:
        new = draw.uniform(-2, 2, width)
        if (np.linalg.norm(centres - new[None], axis=1) > 10 * spread).all():
            centres = np.vstack([centres, new])
    label = draw.integers(clusters, size=count)
    return centres[label] + spread * draw.normal(size=(count, width)), label


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 4))
def test_rows_are_ordered_by_all_their_numbers(seed, count, width):
    rows = np.random.default_rng(seed).integers(0, 3, (count, width)).astype(float)
    assert (canonical_order(rows) == np.lexsort(rows.T[::-1])).all()


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.sampled_from([2, 4]))
@example(1849, 4, 2)
def test_clusters_that_are_apart_are_found(seed, clusters, width):
    points, label = blobs(seed, clusters, width)
    # Columns are standardised. One in which the centres hardly differ becomes noise as
    # wide as the distances: clusters are long and parallel then, and PPP takes such as
    # one.
    assume(clusters == 1 or (points.std(axis=0) > 3 * SPREAD).all())
    found = PPP(max_clusters=8).fit(points)
    assert found.found == clusters
    # A mixture may stretch to one far point of another part: it isn't sure of that one.
    assert adjusted_rand(found.labels[found.core], label[found.core]) == 1
    assert adjusted_rand(found.labels, label) > 0.98 and found.core.mean() > 0.95
    assert np.array_equal(found.predict(points), found.labels)


def uneven(seed, count=400):
    """Points around five centres, the widest five times as wide as the narrowest."""
    draw = np.random.default_rng(seed)
    centres, label = draw.uniform(-4, 4, (5, 2)), draw.integers(5, size=count)
    wide = np.linspace(0.1, 0.5, 5)[label, None]
    return centres[label] + wide * draw.normal(size=(count, 2)), label


def test_a_point_outside_of_the_core_has_its_components_label():
    """The nearest centre gives a narrow cluster what a wide one beside it has lost."""
    wrong = {"component": 0, "centre": 0}
    for seed in range(12):
        points, label = uneven(seed)
        ppp = PPP(max_clusters=8).fit(points)
        if ppp.found != 5:
            continue  # too close to each other
        names = dict(zip(ppp.labels[ppp.core], label[ppp.core], strict=True))
        assert len(names) == 5
        part = nearest(ppp._frame.apply(points), ppp._centres)
        for name, found in (("component", ppp.labels), ("centre", ppp._numbers[part])):
            true = np.array([names[f] for f in found])
            wrong[name] += int((true != label)[~ppp.core].sum())
        assert np.array_equal(ppp.predict(points), ppp.labels)
    assert wrong["component"] < wrong["centre"] / 2


def test_parts_that_the_mixture_doesnt_confirm_are_k_means():
    points = np.random.default_rng(2).uniform(size=(300, 2))
    ppp = PPP(num_clusters=7).fit(points)
    assert not ppp.tried[0].separable(ppp.agreement)
    part = nearest(ppp._frame.apply(points), ppp._centres)
    assert np.array_equal(ppp.labels, ppp._numbers[part])
    assert ppp.report()["sizes"] == sorted(np.bincount(part).tolist(), reverse=True)


def test_a_hundred_orders_give_the_same_labels():
    points, _ = blobs(1, 5, 3, 300, 0.2)
    points[:40] = points[40:80]  # equal rows
    first, draw = PPP(max_clusters=8).fit(points), np.random.default_rng(0)
    for _ in range(100):
        order = draw.permutation(len(points))
        again = PPP(max_clusters=8).fit(points[order])
        assert np.array_equal(again.labels, first.labels[order])
        assert np.array_equal(again.core, first.core[order])
        assert again.tried == first.tried


_PRINT = """
import hashlib, numpy as np
from uoe_jax.cluster.ppp import PPP
draw = np.random.default_rng(3)
points = draw.normal(size=(6, 24))[draw.integers(6, size=3000)]
points += 0.6 * draw.normal(size=points.shape)
found = PPP(max_clusters=8).fit(points)
print(found.found, hashlib.sha256(found.labels.tobytes()).hexdigest())
"""


def test_threads_change_no_label():
    said = set()
    for threads in ("1", "2", "3"):
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        env = {**os.environ, **dict.fromkeys(names, threads)}
        done = subprocess.run(
            [sys.executable, "-c", _PRINT], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        said.add(done.stdout)
    assert len(said) == 1 and said.pop().startswith("6 ")


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.floats(-1e3, 1e3), st.floats(0.01, 100))
def test_shifts_scales_and_copies_change_no_cluster(seed, shift, scale):
    points, _ = blobs(seed, 3, 3, 200)
    first = PPP(max_clusters=6).fit(points)
    moved = PPP(max_clusters=6).fit(points * scale + shift)
    assert np.array_equal(moved.labels, first.labels)
    twice = PPP(max_clusters=6).fit(np.concatenate([points, points]))
    assert twice.found == first.found


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_agreement_is_a_share_and_completed_likelihood_is_no_better(seed):
    points = np.random.default_rng(seed).uniform(size=(150, 2))
    tried = PPP().fit(points).tried
    assert tried[0].num_clusters == 1 and tried[0].agreement == 1
    assert all(0 <= t.agreement <= 1 and t.icl >= t.bic for t in tried)


@pytest.mark.parametrize(
    "points",
    [np.zeros((1, 3)), np.ones((50, 2)), np.eye(5), np.arange(4.0)[:, None][:1]],
)
def test_too_little_to_tell_is_one_cluster(points):
    found = PPP().fit(points)
    assert found.found == 1 and (found.labels == 0).all() and found.core.all()
    assert found.report()["sizes"] == [len(points)]


def test_constant_columns_say_nothing():
    points, _ = blobs(4, 3, 2, 200)
    wide = np.insert(points, 1, 7.0, axis=1)
    assert np.array_equal(PPP().fit(wide).labels, PPP().fit(points).labels)


def test_one_blob_and_a_cube_are_one_cluster():
    draw = np.random.default_rng(0)
    assert PPP().fit(draw.normal(size=(600, 3))).found == 1
    assert PPP().fit(draw.uniform(size=(600, 3))).found == 1


def test_a_number_that_is_asked_for_is_given():
    points, _ = blobs(5, 4)
    assert PPP(num_clusters=6).fit(points).found == 6
    assert PPP(num_clusters=1).fit(points).found == 1


def test_wrong_points_are_refused_in_one_line():
    points, _ = blobs(6)
    wrong = {
        "row 3, column 1 is nan": np.where(
            np.arange(800).reshape(-1, 2) == 7, np.nan, points
        ),
        "type object": np.array([["a", {}]], object),
        r"shape \[5\]": np.zeros(5),
        r"shape \[0, 2\]": np.zeros((0, 2)),
        "type complex": np.zeros((2, 2), complex),
    }
    for word, array in wrong.items():
        with pytest.raises(DataError, match=word):
            PPP().fit(array)
    with pytest.raises(ConfigError, match="500 and there are 400 points"):
        PPP(num_clusters=500).fit(points)
    with pytest.raises(ConfigError, match="too few different values"):
        PPP(num_clusters=3).fit(np.repeat(np.eye(2), 5, axis=0))
    with pytest.raises(ConfigError, match=r"call fit\(points\) first"):
        PPP().predict(points)


@pytest.mark.parametrize("kind", ["full", "diag", "spherical"])
def test_the_mixture_is_that_of_scikit_learn_from_the_same_start(kind):
    points, label = blobs(7, 3, 3, 300, 0.3)
    ours = grow_mixture(points, label, np.ones(len(points)), kind)
    start = np.stack([points[label == c].mean(axis=0) for c in range(3)])
    theirs = GaussianMixture(
        3, covariance_type=kind, means_init=start, reg_covar=1e-4, tol=1e-7
    ).fit(points)
    assert_close(ours.means, theirs.means_, 1e-2)
    assert_close(ours.bic, theirs.bic(points), 1e-3)
    assert_close(ours.predict(points), ours.posterior, 1e-2, least=1.0)


def test_weights_count_as_copies():
    points, label = blobs(8, 3, 2, 60)
    times = np.random.default_rng(8).integers(1, 4, size=60)
    copied, labels = np.repeat(points, times, axis=0), np.repeat(label, times)
    heavy = grow_mixture(points, label, times.astype(float), "full")
    plain = grow_mixture(copied, labels, np.ones(len(copied)), "full")
    assert_close(heavy.means, plain.means, 1e-7)
    assert_close(heavy.log_likelihood, plain.log_likelihood, 1e-7)
    start = Split(points, times.astype(float)).centres(3)
    assert_close(start, Split(copied).centres(3), 1e-7)
    parts = lloyd(points, start, times.astype(float))
    assert_close(parts.centres, lloyd(copied, start).centres, 1e-7)


def test_a_coreset_weighs_as_much_as_all_and_has_their_mean():
    points, _ = blobs(9, 4, 3, 20_000, 0.3)
    points = points[np.lexsort(points.T)]
    chosen, weights = coreset(points, 2000)
    assert len(chosen) <= 2000
    assert_close(weights.sum(), len(points), 1e-9)
    assert_close(weights @ points[chosen] / len(points), points.mean(axis=0), 0.05)


def test_many_points_are_clustered_by_few(monkeypatch):
    points, label = blobs(10, 5, 4, 3000, 0.2)
    whole = PPP(max_clusters=8).fit(points)
    monkeypatch.setattr("uoe_jax.cluster.ppp.CORESET_ABOVE", 1000)
    monkeypatch.setattr("uoe_jax.cluster.ppp.CORESET_SIZE", 500)
    few = PPP(max_clusters=8).fit(points)
    assert few.found == whole.found == 5
    assert adjusted_rand(few.labels, label) == 1
    assert np.array_equal(few.labels, whole.labels)


def test_axes_point_to_their_largest_loading():
    points, _ = blobs(11, 4, 5, 200, 0.2)
    axes = make_frame(points).axes
    assert (axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])] > 0).all()
    assert_close(axes.T @ axes, np.eye(axes.shape[1]), 1e-9)


def test_points_too_far_for_any_density_go_to_the_nearest_centre(recwarn):
    rng = np.random.default_rng(0)
    near = rng.normal(size=(200, 2)) + [3, 0]
    found = PPP(num_clusters=2).fit(np.concatenate([near, -near]))
    right, left = found.predict(np.array([[3.0, 0], [-3.0, 0]]))
    far = found.predict(np.array([[1e160, 0], [-1e160, 0]]))
    assert right != left and far.tolist() == [right, left]
    assert not recwarn.list
