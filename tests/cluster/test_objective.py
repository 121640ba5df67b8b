"""MLC's objective by columns of memberships: the plain form's, in less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compare import assert_close
from uoe_jax.cluster.coding_rate import rate_reduction
from uoe_jax.cluster.descent import main_step
from uoe_jax.cluster.network import TwoHeads, unit_rows
from uoe_jax.cluster.objective import membership, value
from uoe_jax.cluster.sinkhorn import HALF_STEPS


def plain_membership(c, eta, absolute):
    """Every half-step on the whole matrix, left to automatic differentiation."""
    scores = c @ c.T
    logs = (jnp.abs(scores) if absolute else scores) / eta
    step = lambda s, _: (0.5 * (s - jnp.log(jnp.exp(logs + s[None]).sum(axis=1))), None)
    scale = jax.lax.scan(step, jnp.zeros(len(c)), length=HALF_STEPS)[0]
    pi = jnp.exp(logs + scale[None] + scale[:, None])
    return pi / pi.sum(axis=1, keepdims=True)


def plain_value(features, clusters, *, eps2, eta, absolute, gamma):
    z = unit_rows(0.5 * (features[0] + features[1]))
    pi = sum(plain_membership(c, eta, absolute) for c in clusters) / 2
    return rate_reduction(z, pi, eps2) - 0.5 * gamma * jnp.square(pi).sum()


@functools.partial(jax.jit, static_argnums=(0, 1))
def with_gradient(form, knobs, rows, absolute):
    """A form of the objective of rows [view, head, N, D], and its gradient."""

    def run(rows):
        (z, c), (z2, c2) = rows
        kept = dict(zip(("eps2", "eta", "gamma"), knobs, strict=True))
        found = [form((z, z2), (c, c2), absolute=a, **kept) for a in (False, True)]
        return jnp.where(absolute, found[1], found[0])

    return jax.value_and_grad(run)(rows)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    knobs=st.sampled_from([(0.1, 0.1, 0.0), (0.3, 0.5, 0.3)]),  # eps2, eta, gamma
    absolute=st.booleans(),
)
def test_value_and_gradient_are_the_plain_forms(seed, knobs, absolute):
    # Of 21 columns 8 are made at a time, of rows 6.
    rows = np.random.default_rng(seed).normal(size=(2, 2, 21, 4))
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr("uoe_jax.cluster.sinkhorn.ROWS", 6)
        rows = unit_rows(jnp.asarray(rows.reshape(-1, 4))).reshape(rows.shape)
        found, slope = with_gradient(value, knobs, rows, absolute)
        wanted, steep = with_gradient(plain_value, knobs, rows, absolute)
    assert_close(found, wanted, 1e-9, least=1.0)
    assert_close(slope, steep, 1e-9, least=1.0)


def test_the_matrix_for_labels_is_the_trainings():
    with jax.enable_x64(True):
        c = unit_rows(jnp.asarray(np.random.default_rng(0).normal(size=(19, 4))))
        for absolute in (False, True):
            found = membership(c, 0.1, absolute)
            assert_close(found, plain_membership(c, 0.1, absolute), 1e-9)


def bytes_of_a_step(count):
    graph, state = nnx.split(TwoHeads(8, 16, 8, nnx.Rngs(0)))
    step = main_step(graph, (0.1, 0.1, 0.0, False, 0.1), 1e-4)
    told = state, step.memory(state), jnp.zeros((count, 8)), jax.random.key(0)
    return step.run.lower(*told).compile().memory_analysis().temp_size_in_bytes


def test_a_training_steps_memory_is_linear_in_the_batch():
    small, large = bytes_of_a_step(512), bytes_of_a_step(4096)
    assert large < 9 * small  # N x N numbers would be 64 times as many
    assert large < 4096 * 4096 * 4  # not one such matrix
