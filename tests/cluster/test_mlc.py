"""MLC: affinity alone, the network, and what is asked of both."""

import numpy as np
import pytest
from sklearn.cluster import KMeans

from uoe_jax.cluster import MLC
from uoe_jax.cluster.metrics import accuracy
from uoe_jax.errors import ConfigError, DataError

QUICK = {"start_steps": 2, "steps": 2, "hidden": 16, "width": 8, "batch": 32}


def planes(seed=0, each=40):
    """Points of five planes through the origin, each at right angles to the others."""
    draw = np.random.default_rng(seed)
    bases = np.linalg.qr(draw.normal(size=(10, 10)))[0].reshape(10, 5, 2)
    label = np.repeat(np.arange(5), each)
    points = np.einsum("nr,dnr->nd", draw.normal(size=(len(label), 2)), bases[:, label])
    return points, label


def pieces(seed=0, count=800):
    """Points near eight curves in 16 dimensions that all pass close by the origin."""
    draw = np.random.default_rng(seed)
    label, t = np.arange(count) % 8, draw.uniform(-1, 1, count)
    curve = np.stack([t, np.sin(3 * t), np.cos(3 * t) - 0.5], axis=1)
    points = np.einsum("nr,nrd->nd", curve, draw.normal(size=(8, 3, 16))[label])
    return points + 0.01 * draw.normal(size=points.shape), label


def test_planes_at_right_angles_need_no_network():
    points, label = planes()
    found = MLC(num_clusters=5, network=False).fit(points)
    assert accuracy(found.labels, label) == 1
    assert found.report()["cluster_ranks"] == [2] * 5 and found.report()["rank"] == 10
    assert np.array_equal(found.predict(points), found.labels)
    pi = found.membership(points)
    same = label[:, None] == label[None]
    assert (pi * same).sum(axis=1).min() > 0.99  # of each row's 1


@pytest.mark.nightly
def test_curved_pieces_are_found_where_kmeans_fails():
    points, label = pieces()
    plain = KMeans(8, n_init=10, random_state=0).fit_predict(points)
    assert accuracy(plain, label) < 0.5
    assert accuracy(MLC(num_clusters=8).fit(points).labels, label) >= 0.95


def test_the_objective_grows_and_a_seed_decides_all():
    points, _ = pieces(1, 96)
    sizes = {"hidden": 32, "width": 8, "batch": 96, "learning_rate": 1e-3}
    first, again = (
        MLC(num_clusters=8, start_steps=20, steps=30, **sizes).fit(points)
        for _ in range(2)
    )
    assert np.mean(first.history[-5:]) > np.mean(first.history[:5])
    assert first.history == again.history
    assert np.array_equal(first.labels, again.labels)
    assert np.array_equal(first.features, again.features)


def test_points_that_are_no_multiple_of_the_batch_and_twins_and_zeros():
    points, _ = pieces(2, 75)
    points[:5], points[5:10] = 0.0, points[10:15]
    for network in (True, False):
        found = MLC(num_clusters=3, network=network, **QUICK).fit(points)
        assert found.labels.shape == (75,) and np.isfinite(found.features).all()
        assert set(found.labels) <= {0, 1, 2}


def test_points_beyond_the_anchors_go_to_a_subspace(monkeypatch):
    monkeypatch.setattr("uoe_jax.cluster.mlc.ANCHORS", 60)
    points, label = planes(3)
    found = MLC(num_clusters=5, network=False).fit(points)
    assert accuracy(found.labels, label) == 1


def test_without_a_number_of_clusters_features_tell_it():
    draw = np.random.default_rng(4)
    label = np.repeat(np.arange(3), 50)
    points = np.eye(3)[label] + 0.03 * draw.normal(size=(150, 3))
    found = MLC(network=False).fit(points)
    assert found.report()["num_clusters"] == 3 and accuracy(found.labels, label) == 1


def test_wrong_requests_are_one_line():
    points, _ = planes(5, 2)
    with pytest.raises(ConfigError, match="num_clusters is 11 and there are 10 points"):
        MLC(num_clusters=11).fit(points)
    with pytest.raises(DataError, match="row 0, column 0 is nan"):
        MLC(num_clusters=2).fit(np.full((4, 2), np.nan))
    with pytest.raises(ConfigError, match=r"call fit\(points\) first"):
        MLC().predict(points)
    with pytest.raises(ConfigError, match="MLC.eta"):
        MLC(eta="hot")
