"""MLC: its objective against plain numpy, and clusters of subspaces and curves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compare import assert_close
from uoe_jax.cluster import MLC
from uoe_jax.cluster.coding_rate import rate_reduction
from uoe_jax.cluster.metrics import accuracy
from uoe_jax.cluster.objective import membership, start_value, value
from uoe_jax.errors import ConfigError, DataError

EPS2, ETA = 0.1, 0.2
KNOBS = {"eps2": EPS2, "eta": ETA, "absolute": False, "gamma": 0.0}
QUICK = {"start_steps": 20, "steps": 5, "hidden": 16, "width": 6, "batch": 40}


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def rows_of(seed, count=14, width=4):
    return unit(np.random.default_rng(seed).normal(size=(count, width)))


def log_det(gram):
    return np.linalg.slogdet(np.eye(len(gram)) + gram)[1]


def plain_rate(z, eps2=EPS2):
    count, width = z.shape
    return log_det(width / (count * eps2) * z.T @ z)


def plain_reduction(z, pi, eps2=EPS2):
    """R - Rc as equations 5 and 6 are written, without a factor one half."""
    count, width = z.shape
    each = [log_det(width / eps2 * z.T @ np.diag(pi[:, j]) @ z) for j in range(count)]
    return plain_rate(z, eps2) - sum(each) / count


def plain_membership(scores, eta=ETA):
    """Rows and columns of exp(scores / eta) by turns, until both sum to one."""
    pi = np.exp((scores - scores.max()) / eta)
    for _ in range(2000):
        pi = pi / pi.sum(axis=1, keepdims=True)
        pi = pi / pi.sum(axis=0, keepdims=True)
    return pi


def planes(seed, count=5, each=40):
    """Points on planes that are at right angles to each other, and their plane."""
    draw = np.random.default_rng(seed)
    axes = np.linalg.qr(draw.normal(size=(2 * count, 2 * count)))[0]
    label = draw.permutation(np.repeat(np.arange(count), each))
    points = np.zeros((len(label), 2 * count))
    for j in range(count):
        on = label == j
        points[on] = draw.normal(size=(on.sum(), 2)) @ axes[2 * j : 2 * j + 2]
    return points, label


def test_the_membership_is_what_sinkhorn_by_turns_ends_with(float64):
    for seed in range(3):
        c = rows_of(seed)
        for absolute in (False, True):
            scores = np.abs(c @ c.T) if absolute else c @ c.T
            found = np.asarray(membership(jnp.asarray(c), ETA, absolute))
            assert_close(found, plain_membership(scores), 1e-3)


def test_the_objective_is_the_papers(float64):
    for seed in range(3):
        z, z2, c, c2 = (rows_of(10 * seed + n) for n in range(4))
        mean = unit(z + z2)
        pi = 0.5 * (plain_membership(c @ c.T) + plain_membership(c2 @ c2.T))
        for gamma in (0.0, 0.3):
            want = plain_reduction(mean, pi) - 0.5 * gamma * np.square(pi).sum()
            views = [tuple(map(jnp.asarray, pair)) for pair in ((z, z2), (c, c2))]
            found = value(*views, **{**KNOBS, "gamma": gamma})
            assert_close(np.asarray(found), want, 2e-3)
        start = start_value(views[0], EPS2, 20.0)
        want = plain_rate(0.5 * (z + z2)) + 20 * np.abs((z * z2).sum(axis=1)).mean()
        assert_close(np.asarray(start), want, 1e-9)


def test_one_cluster_of_all_and_points_alone_are_known(float64):
    z = rows_of(5)
    count, width = z.shape
    for pi, rest in (
        (np.full((count,) * 2, 1 / count), plain_rate(z)),
        (np.eye(count), np.log(1 + width / EPS2)),
    ):
        found = rate_reduction(jnp.asarray(z), jnp.asarray(pi), EPS2)
        assert_close(np.asarray(found), plain_rate(z) - rest, 1e-9, least=1)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_turning_and_reordering_change_no_objective(seed):
    draw = np.random.default_rng(seed)
    turn = np.linalg.qr(draw.normal(size=(4, 4)))[0]
    order = draw.permutation(14)
    rows = [rows_of(draw.integers(2**31)) for _ in range(4)]
    with jax.enable_x64(True):
        found = [
            float(value((z, z2), (c, c2), **KNOBS))
            for z, z2, c, c2 in (
                map(jnp.asarray, rows),
                (jnp.asarray(r[order] @ turn) for r in rows),
            )
        ]
    assert abs(found[0] - found[1]) < 1e-9


def test_planes_at_right_angles_are_found_by_the_affinity_alone():
    for seed in range(3):
        points, label = planes(seed)
        mlc = MLC(num_clusters=5, network=False).fit(points)
        assert accuracy(mlc.labels, label) == 1.0
        report = mlc.report()
        assert report["sizes"] == [40] * 5 and report["cluster_ranks"] == [2] * 5
        assert (mlc.predict(points) == mlc.labels).all()


def test_points_that_are_no_anchors_go_to_their_plane(monkeypatch):
    monkeypatch.setattr("uoe_jax.cluster.mlc.ANCHORS", 100)
    points, label = planes(7)
    mlc = MLC(num_clusters=5, network=False).fit(points)
    assert accuracy(mlc.labels, label) == 1.0


def test_training_makes_the_objective_larger_and_the_seed_decides():
    points, label = planes(1, count=2, each=30)
    same = [MLC(num_clusters=2, **QUICK, seed=3).fit(points) for _ in range(2)]
    assert (same[0].labels == same[1].labels).all()
    assert same[0].history == same[1].history and len(same[0].history) == 5
    other = MLC(num_clusters=2, **QUICK, seed=4).fit(points)
    assert other.history != same[0].history
    longer = MLC(num_clusters=2, **{**QUICK, "steps": 40}, learning_rate=1e-3)
    history = longer.fit(points).history
    assert np.mean(history[-5:]) > np.mean(history[:5])
    assert len(longer.labels) == len(label)


def test_the_start_copies_the_feature_head_into_the_cluster_head():
    points, _ = planes(2, count=2, each=30)
    mlc = MLC(num_clusters=2, **{**QUICK, "steps": 0}).fit(points)
    z, c = mlc._rows(points)
    assert (z == c).all()


def test_what_cant_be_clustered_is_refused_in_one_line():
    points = np.random.default_rng(0).normal(size=(6, 3))
    with pytest.raises(ConfigError, match="num_clusters is 7 and there are 6 points"):
        MLC(num_clusters=7, network=False).fit(points)
    with pytest.raises(ConfigError, match="too few different"):
        MLC(num_clusters=3, network=False).fit(np.ones((6, 3)))
    with pytest.raises(ConfigError, match="call fit"):
        MLC().predict(points)
    points[4, 1] = np.nan
    with pytest.raises(DataError, match="row 4, column 1 is nan"):
        MLC(network=False).fit(points)


def test_equal_points_are_one_cluster():
    tables = np.ones((6, 3)), np.zeros((6, 3)), np.ones((1, 2))
    for points, network in (*((p, False) for p in tables), (tables[0], True)):
        mlc = MLC(network=network, **QUICK).fit(points)
        assert (mlc.labels == 0).all() and np.isfinite(mlc.features).all()
