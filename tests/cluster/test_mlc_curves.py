"""MLC on curves, on points that are awkward, and without a number of clusters."""

import numpy as np
import pytest
from sklearn.cluster import KMeans

from uoe_jax.cluster import MLC
from uoe_jax.cluster.metrics import accuracy

QUICK = {"start_steps": 2, "steps": 2, "hidden": 16, "width": 8, "batch": 32}


def pieces(seed=0, count=800):
    """Points near eight curves in 16 dimensions that all pass close by the origin."""
    draw = np.random.default_rng(seed)
    label, t = np.arange(count) % 8, draw.uniform(-1, 1, count)
    curve = np.stack([t, np.sin(3 * t), np.cos(3 * t) - 0.5], axis=1)
    points = np.einsum("nr,nrd->nd", curve, draw.normal(size=(8, 3, 16))[label])
    return points + 0.01 * draw.normal(size=points.shape), label


@pytest.mark.nightly
def test_curved_pieces_are_found_where_kmeans_fails():
    points, label = pieces()
    plain = KMeans(8, n_init=10, random_state=0).fit_predict(points)
    assert accuracy(plain, label) < 0.5
    assert accuracy(MLC(num_clusters=8).fit(points).labels, label) >= 0.95


def test_points_that_are_no_multiple_of_the_batch_and_twins_and_zeros():
    points, _ = pieces(2, 75)
    points[:5], points[5:10] = 0.0, points[10:15]
    for network in (True, False):
        found = MLC(num_clusters=3, network=network, **QUICK).fit(points)
        assert found.labels.shape == (75,) and np.isfinite(found.features).all()
        assert set(found.labels) <= {0, 1, 2}


def test_without_a_number_of_clusters_features_tell_it():
    draw = np.random.default_rng(4)
    label = np.repeat(np.arange(3), 50)
    points = np.eye(3)[label] + 0.03 * draw.normal(size=(150, 3))
    found = MLC(network=False).fit(points)
    assert found.report()["num_clusters"] == 3 and accuracy(found.labels, label) == 1
