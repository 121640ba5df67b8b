"""Labels from affinities, groups of equal size, and the metrics of both."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn import metrics as known

from tests.compare import assert_close
from uoe_jax.cluster.balance import balanced_assignment, balanced_kmeans
from uoe_jax.cluster.metrics import (
    accuracy,
    adjusted_rand,
    mutual_information,
    numerical_rank,
)
from uoe_jax.cluster.spectral import spectral_embedding, spectral_labels
from uoe_jax.errors import ConfigError


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31))
def test_assignments_are_balanced(groups, size, seed):
    likeness = np.random.default_rng(seed).normal(size=(groups * size, groups))
    labels = balanced_assignment(likeness)
    assert np.bincount(labels, minlength=groups).tolist() == [size] * groups


def test_assignments_are_nearly_the_best():
    for seed in range(10):
        likeness = np.random.default_rng(seed).normal(size=(40, 4))
        rows, slots = linear_sum_assignment(-np.repeat(likeness, 10, axis=1))
        best = np.repeat(likeness, 10, axis=1)[rows, slots].sum()
        labels = balanced_assignment(likeness)
        assert likeness[np.arange(40), labels].sum() > 0.97 * best


def test_balance_finds_equal_groups_that_are_there():
    draw = np.random.default_rng(0)
    label = draw.permutation(np.repeat(np.arange(4), 16))
    points = np.eye(4)[label] + draw.normal(0, 0.1, (64, 4))
    assert adjusted_rand(balanced_kmeans(points, 4), label) == 1


def test_spectral_labels_find_blocks_in_any_order():
    draw = np.random.default_rng(1)
    label = draw.permutation(np.repeat(np.arange(5), [4, 9, 16, 6, 5]))
    noise = draw.uniform(0, 0.1, (40, 40))
    affinity = (label[:, None] == label[None]) + noise
    found = spectral_labels(affinity, 5)
    assert adjusted_rand(found, label) == 1
    order = draw.permutation(40)
    moved = spectral_labels(affinity[np.ix_(order, order)], 5)
    assert adjusted_rand(moved, label[order]) == 1


def test_spectral_takes_duplicates_and_points_without_affinity():
    affinity = np.kron(np.eye(2), np.ones((3, 3)))
    affinity = np.pad(affinity, (0, 1))
    rows = spectral_embedding(affinity, 2)
    assert np.isfinite(rows).all() and spectral_labels(affinity, 2).shape == (7,)
    assert spectral_labels(np.ones((1, 1)), 1).tolist() == [0]
    for count in (0, 8):
        with pytest.raises(ConfigError, match="it must be 1 to 7"):
            spectral_labels(affinity, count)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_metrics_are_those_of_scikit_learn(count, clusters, classes, seed):
    draw = np.random.default_rng(seed)
    first, second = (
        draw.integers(clusters, size=count),
        draw.integers(classes, size=count),
    )
    wanted = known.normalized_mutual_info_score(second, first)
    assert_close(mutual_information(first, second), wanted, 1e-9, least=1.0)
    wanted = known.adjusted_rand_score(second, first)
    assert_close(adjusted_rand(first, second), wanted, 1e-9, least=1.0)


def test_accuracy_matches_clusters_to_classes():
    assert accuracy(np.array([2, 2, 0, 0, 1]), np.array(list("aabbb"))) == 0.8


def test_numerical_rank_counts_directions_with_energy():
    draw = np.random.default_rng(2)
    z = draw.normal(size=(200, 3)) @ np.linalg.qr(draw.normal(size=(20, 3)))[0].T
    assert numerical_rank(z) == 3 and numerical_rank(z + 1e-3) <= 4
    assert numerical_rank(np.eye(2, 20)) == 2 and numerical_rank(np.zeros((4, 3))) == 0
