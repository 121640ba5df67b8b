"""A transformer's own matrices, recovered from part of their entries."""

import numpy as np
import pytest

from uoe_jax.errors import DataError
from uoe_jax.linalg.completion import complete_matrix

SIZE, RANK = 96, 6


@pytest.fixture(scope="module")
def seen(seed):
    return np.random.default_rng(seed).random((SIZE, SIZE)) < 0.6


def error_of(matrix, seen):
    """Relative error of the entries that were hidden."""
    hidden = np.where(seen, matrix, np.nan)
    options = {"ridge": 1e-3, "iters": 60, "tol": 1e-6, "solver": "exact"}
    model, factors = complete_matrix(hidden, seen, RANK, **options)
    np.testing.assert_array_equal(np.asarray(model)[seen], hidden[seen].astype("f4"))
    assert factors.rank == RANK
    missed = (np.asarray(model) - matrix)[~seen]
    return np.linalg.norm(missed) / np.linalg.norm(matrix[~seen])


def test_a_heads_query_key_weight_is_recovered(seed, seen):
    """x W_Q W_K^T x^T is all that scores depend on; its rank is the head's width."""
    draw = np.random.default_rng(seed)
    wq, wk = draw.normal(size=(SIZE, RANK)), draw.normal(size=(SIZE, RANK))
    assert error_of(wq @ wk.T / RANK**0.5, seen) < 1e-2


def test_an_attention_map_is_recovered(seed, seen):
    """Probabilities over smooth positions: not low rank, but close to it."""
    draw = np.random.default_rng(seed)
    time = np.linspace(0, 1, SIZE)[:, None]
    features = np.cos(np.pi * time * np.arange(4) + draw.uniform(0, 6, 4))
    scores = features @ draw.normal(size=(4, 4)) @ features.T / 4
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights = SIZE * weights / weights.sum(1, keepdims=True)
    assert error_of(weights, seen) < 0.1


def test_a_mask_of_another_shape_is_refused(seen):
    with pytest.raises(DataError, match="one flag for each entry"):
        complete_matrix(np.zeros((3, 2)), seen)
