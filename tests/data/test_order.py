"""The computed permutation is one, looks random and needs only seed and place."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.data.order import eval_order, permute, train_order

SIZES = st.integers(1, 3000)


@given(size=SIZES, key=st.tuples(st.integers(), st.integers()))
@settings(max_examples=40, deadline=None)
def test_permute_is_a_permutation(size, key):
    result = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(result), np.arange(size))


def test_permute_has_no_structure():
    # 16 x 16 table of (place, destination) counts; 225 degrees of freedom. Feistel
    # draws without replacement, so the statistic is below a chi-square's: 350 is past
    # the 1 - 1e-7 quantile, while the identity gives 250,000.
    size = 1 << 14
    result = permute(np.arange(size), size, (1, 2))
    table = np.histogram2d(np.arange(size), result, bins=16)[0]
    expected = size / 256
    assert ((table - expected) ** 2 / expected).sum() < 350


def test_keys_give_unrelated_orders():
    size = 5000
    one, two = (permute(np.arange(size), size, (seed, 0)) for seed in (0, 1))
    # Two independent permutations agree in one place on average (Poisson).
    assert (one == two).sum() < 12


@given(size=SIZES, seed=st.integers(0, 2**31), epoch=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_every_epoch_has_every_example_once(size, seed, epoch):
    positions = np.arange(epoch * size, (epoch + 1) * size)
    assert np.array_equal(np.sort(train_order(positions, size, seed)), np.arange(size))


def test_epochs_differ():
    one = train_order(np.arange(500), 500, 3)
    two = train_order(np.arange(500, 1000), 500, 3)
    assert not np.array_equal(one, two)


@given(size=SIZES, start=st.integers(0, 10_000), length=st.integers(1, 200))
@settings(max_examples=40, deadline=None)
def test_train_order_is_the_same_asked_in_parts(size, start, length):
    positions = np.arange(start, start + length)
    whole = train_order(positions, size, 7)
    parts = [train_order(positions[i : i + 1], size, 7)[0] for i in range(length)]
    assert whole.tolist() == parts


@given(size=SIZES, batch=st.integers(1, 64))
@settings(max_examples=40, deadline=None)
def test_eval_order_covers_everything_once(size, batch):
    places = -(-size // batch) * batch
    result = eval_order(np.arange(places), size)
    assert np.array_equal(np.sort(result[result >= 0]), np.arange(size))
    assert (result[size:] == -1).all()


def test_permute_of_a_billion_is_immediate_and_in_range():
    size = 10**9 + 7
    result = permute(np.arange(0, size, size // 1000), size, (0, 0))
    assert result.min() >= 0 and result.max() < size
    assert len(np.unique(result)) == len(result)
