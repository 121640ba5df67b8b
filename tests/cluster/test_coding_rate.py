"""Coding rates and doubly stochastic membership: identities, bounds, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compare import assert_close
from uoe_jax.cluster.coding_rate import (
    cluster_coding_rate,
    coding_rate,
    rate_reduction,
)
from uoe_jax.cluster.sinkhorn import sinkhorn

EPS2 = 0.1


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def unit_rows(seed, count=24, width=5):
    rows = np.random.default_rng(seed).normal(size=(count, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def membership(z, eta=0.2):
    return np.asarray(sinkhorn(jnp.asarray(z @ z.T), eta))


def test_rates_of_one_cluster_and_of_single_points_are_known(float64):
    z = unit_rows(0)
    count, width = z.shape
    together = cluster_coding_rate(
        jnp.asarray(z), jnp.full((count,) * 2, 1 / count), EPS2
    )
    assert_close(together, coding_rate(jnp.asarray(z), EPS2), 1e-10)
    alone = cluster_coding_rate(jnp.asarray(z), jnp.eye(count), EPS2)
    assert_close(alone, np.log(1 + width / EPS2), 1e-10)


def test_rate_is_the_sum_of_logs_of_singular_values(float64):
    z = unit_rows(1)
    count, width = z.shape
    values = np.linalg.svd(z, compute_uv=False)
    wanted = np.log1p(width / (count * EPS2) * values**2).sum()
    assert_close(coding_rate(jnp.asarray(z), EPS2), wanted, 1e-10)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.05, 0.1, 0.5]))
def test_clusters_take_no_more_than_the_whole_whatever_the_frame(seed, eta):
    z = unit_rows(seed)
    pi = membership(z, eta)
    rate, within = (
        float(coding_rate(jnp.asarray(z), EPS2)),
        float(cluster_coding_rate(jnp.asarray(z), jnp.asarray(pi), EPS2)),
    )
    assert 0 <= within <= rate + 1e-4
    draw = np.random.default_rng(seed)
    turn = np.linalg.qr(draw.normal(size=(z.shape[1],) * 2))[0]
    order = draw.permutation(len(z))
    moved = rate_reduction(
        jnp.asarray((z @ turn)[order]), jnp.asarray(pi[np.ix_(order, order)]), EPS2
    )
    assert_close(moved, rate - within, 1e-4, least=rate)


def test_true_clusters_reduce_the_rate_most():
    draw = np.random.default_rng(3)
    label = np.repeat(np.arange(3), 8)
    bases = np.linalg.qr(draw.normal(size=(6, 6)))[0].reshape(6, 3, 2)
    z = np.einsum("nr,dnr->nd", draw.normal(size=(24, 2)), bases[:, label])
    z = jnp.asarray(z / np.linalg.norm(z, axis=1, keepdims=True))
    block = lambda kind: jnp.asarray((kind[:, None] == kind[None]) / 8.0)
    best = float(rate_reduction(z, block(label), EPS2))
    others = [draw.permutation(label) for _ in range(200)]
    assert all(float(rate_reduction(z, block(o), EPS2)) <= best + 1e-5 for o in others)


def test_gradients_are_finite_differences(float64):
    z, draw = unit_rows(4, 10, 4), np.random.default_rng(4)
    pi = lambda a: sinkhorn(a @ a.T, 0.2)
    value = lambda a: rate_reduction(a, pi(a), EPS2)
    slope = np.asarray(jax.grad(value)(jnp.asarray(z)))
    for _ in range(5):
        step = draw.normal(size=z.shape)
        ahead, behind = (float(value(jnp.asarray(z + s * step))) for s in (1e-5, -1e-5))
        assert_close((ahead - behind) / 2e-5, (slope * step).sum(), 1e-5, least=1.0)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([11, 15]))
def test_membership_is_doubly_stochastic(seed, half_steps):
    z = unit_rows(seed, 64, 8)
    pi = np.asarray(sinkhorn(jnp.asarray(z @ z.T), 0.175, half_steps))
    assert (pi >= 0).all()
    assert_close(pi.sum(axis=1), 1.0, 1e-5)
    assert_close(pi.sum(axis=0), 1.0, 1e-4)


def bytes_of_a_gradient(count):
    z, pi = jnp.zeros((count, 64)), jnp.zeros((count, count))
    compiled = jax.jit(jax.grad(rate_reduction), static_argnums=2).lower(z, pi, EPS2)
    return compiled.compile().memory_analysis().temp_size_in_bytes


def test_the_gradient_of_a_membership_keeps_no_half_steps_matrix():
    """Of 15 half-steps each would keep N x N numbers; a few are needed at most."""
    total = lambda c: jnp.square(sinkhorn(c @ c.T, 0.2)).sum()
    compiled = jax.jit(jax.grad(total)).lower(jnp.zeros((512, 8))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 10 * 512 * 512 * 4


def test_memory_doesnt_hold_a_matrix_for_each_point_and_is_linear_in_the_batch():
    small, large = bytes_of_a_gradient(128), bytes_of_a_gradient(512)
    assert large < 512 * 64 * 64 * 4 / 2  # half of N matrices D x D
    assert large < 4 * small  # a square would be 16 times as much
