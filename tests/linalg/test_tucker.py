"""Tucker decompositions against their definitions, in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compare import assert_close
from uoe_jax.errors import ConfigError
from uoe_jax.linalg.tucker import (
    Tucker,
    clamp_ranks,
    count_tucker,
    hooi,
    hosvd,
    mode_product,
    tucker_to_tensor,
    unfold,
)

SHAPE = (6, 5, 4)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def tensor(double, rng):
    return jnp.asarray(rng.normal(size=SHAPE))


def test_unfold_and_mode_product_are_the_definition(tensor):
    matrix = np.random.default_rng(1).normal(size=(3, 5))
    got = mode_product(tensor, jnp.asarray(matrix), 1)
    assert_close(got, np.einsum("ijk,pj->ipk", tensor, matrix), 1e-12)
    assert_close(unfold(got, 1), matrix @ unfold(tensor, 1), 1e-12)


def test_full_ranks_give_the_tensor_back(tensor):
    parts = hosvd(tensor, SHAPE)
    np.testing.assert_allclose(tucker_to_tensor(parts), tensor, atol=1e-12)
    for factor in parts.factors:
        gram = factor.T @ factor
        np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-12)


def test_error_is_within_the_discarded_energies_and_hooi_is_no_worse(tensor):
    ranks = (3, 3, 2)
    bound = 0.0
    for mode, rank in enumerate(ranks):
        singular = np.linalg.svd(np.asarray(unfold(tensor, mode)), compute_uv=False)
        bound += np.sum(singular[rank:] ** 2)
    errors = [
        np.sum((np.asarray(tucker_to_tensor(f(tensor, ranks))) - tensor) ** 2)
        for f in (hosvd, hooi)
    ]
    assert errors[1] <= errors[0] + 1e-12 <= bound + 1e-9


def test_matrix_case_is_the_truncated_svd():
    matrix = np.random.default_rng(2).normal(size=(7, 5))
    u, s, vt = np.linalg.svd(matrix)
    got = tucker_to_tensor(hosvd(jnp.asarray(matrix), (2, 2)))
    np.testing.assert_allclose(got, (u[:, :2] * s[:2]) @ vt[:2], atol=1e-12)


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.lists(st.integers(1, 9), min_size=4, max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_clamped_ranks_are_reachable_and_counted(shape, wanted):
    ranks = clamp_ranks(shape, wanted[: len(shape)])
    core = np.zeros(ranks)
    factors = tuple(np.zeros((d, r)) for d, r in zip(shape, ranks, strict=True))
    for mode, rank in enumerate(ranks):
        others = int(np.prod(shape)) // shape[mode]
        assert 1 <= rank <= min(shape[mode], others)
    parts = Tucker(core, factors)
    assert count_tucker(shape, ranks) == core.size + sum(f.size for f in parts.factors)


def test_bad_ranks_are_named():
    with pytest.raises(ConfigError, match="give 2"):
        clamp_ranks((3, 3), (1, 1, 1))
    with pytest.raises(ConfigError, match="at least 1"):
        clamp_ranks((3, 3), (1, 0))
