"""Bad entries are refused in one line that names them, or treated as documented."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.errors import ConfigError, DataError
from uoe_jax.linalg.completion import complete, partial_fit, predict
from uoe_jax.linalg.completion.buckets import (
    choose_widths,
    make_buckets,
    make_segments,
    round_up,
)
from uoe_jax.linalg.completion.checks import check_numbers, check_rank
from uoe_jax.linalg.completion.entries import clean_entries, split_entries

GOOD = (np.array([0, 1, 2]), np.array([0, 1, 1]), np.array([1.0, 2.0, 3.0]))


def refuses(error, *words):
    """Expect one line that holds every word."""
    pattern = r"(?s)\A" + "".join(f"(?=.*{word})" for word in words) + r"[^\n]*\Z"
    return pytest.raises(error, match=pattern)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (2, [1.0, np.nan, 3.0], ["values", "nan", "1 such"]),
        (2, [1.0, 2.0, np.inf], ["values", "inf"]),
        (2, ["1", "two", "3"], ["values", "numbers", "two"]),
        (0, [0, 1, 3], ["rows", "3", "0 to 2"]),
        (0, [0, -1, 2], ["rows", "-1", "0 to 2"]),
        (1, [0, 1, 2], ["cols", "2", "0 to 1"]),
        (0, [0.0, 1.5, 2.0], ["rows", "1.5", "integer"]),
        (0, ["a", "b", "c"], ["rows", "integers"]),
        (1, [0, 1], ["lengths", "3, 2, 3"]),
        (0, [[0, 1, 2]], ["rows", "2 dimensions"]),
    ],
)
def test_bad_entries_are_named(place, value, words):
    arrays = list(GOOD)
    arrays[place] = np.array(value)
    with refuses(DataError, *words):
        clean_entries(*arrays, (3, 2))


def test_no_entries_and_weights_that_are_none():
    empty = np.zeros(0, int)
    with refuses(DataError, "0 entries"):
        clean_entries(empty, empty, np.zeros(0), (3, 2))
    with refuses(DataError, "weights", "-1"):
        clean_entries(*GOOD, (3, 2), weights=np.array([1.0, -1.0, 1.0]))
    with refuses(DataError, "weights are all 0"):
        clean_entries(*GOOD, (3, 2), weights=np.zeros(3))
    with refuses(DataError, "two sizes"):
        clean_entries(*GOOD, (3, 2, 1))


def test_duplicates_are_averaged_or_refused():
    rows, cols = np.array([0, 1, 0, 0]), np.array([1, 1, 1, 0])
    values, weights = np.array([1.0, 5.0, 4.0, 7.0]), np.array([1.0, 1.0, 2.0, 1.0])
    entries = clean_entries(rows, cols, values, (2, 2), weights=weights)
    at = list(zip(entries.rows.tolist(), entries.cols.tolist(), strict=True))
    assert sorted(at) == [(0, 0), (0, 1), (1, 1)]
    where = at.index((0, 1))
    assert entries.values[where] == 3.0 and entries.weights[where] == 3.0
    assert entries.num_duplicates == 1
    with refuses(DataError, r"\(0, 1\)", "1 repeats"):
        clean_entries(rows, cols, values, (2, 2), duplicates="error")
    with refuses(DataError, r"\(0, 1\)", "numpy"):
        clean_entries(jnp.asarray(rows), jnp.asarray(cols), jnp.asarray(values), (2, 2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 3}, ["rank is 3", "1 to 2"]),
        ({"rank": 0}, ["rank is 0"]),
        ({"rank": "big"}, ["rank is 'big'"]),
        ({"solver": "exakt"}, ["solver is 'exakt'", "did you mean exact"]),
        ({"kernel": "tile"}, ["kernel is 'tile'"]),
        ({"kernel": "segment", "solver": "exact"}, ["segment", "exact"]),
        ({"dtype": np.float64}, ["float64", "jax_enable_x64"]),
        ({"dtype": np.int32}, ["int32"]),
        ({"ridge": -1.0}, ["ridge is -1"]),
        ({"tol": float("nan")}, ["tol is nan"]),
        ({"iters": 0}, ["iters is 0", "above 0"]),
        ({"ridge_power": float("inf")}, ["ridge_power is inf"]),
        ({"bias_ridge": -1.0}, ["bias_ridge is -1"]),
        ({"clip_mu": 0.0}, ["clip_mu is 0", "above 0"]),
        ({"passes": 0}, ["passes is 0"]),
        ({"patience": 0}, ["patience is 0"]),
        ({"holdout": [[0], [0]]}, ["holdout has 2 parts"]),
        ({"holdout": 1.5}, ["holdout is 1.5"]),
        ({"duplicates": "sum"}, ["duplicates is 'sum'"]),
        ({"solver": 3}, ["solver is 3", "`Solver`"]),
        ({"tol": "small"}, ["tol is 'small'", "a number"]),
        ({"ridge": "0.1"}, ["ridge is '0.1'", "a number"]),
        ({"ridge_power": None}, ["ridge_power is None", "a number"]),
        ({"dtype": "float33"}, ["dtype is 'float33'", "float32 or float64"]),
        ({"mesh": 3}, ["mesh is 3", "axis 'data'"]),
        ({"key": 3}, ["key is 3", "jax.random.key"]),
        ({"key": jnp.arange(2)}, ["key is int32 .2.", "jax.random.key"]),
        ({"callback": "print"}, ["callback is 'print'", "a function"]),
        ({"biases": "yes"}, ["biases is 'yes'", "True or False"]),
        ({"split": 2}, ["split is 2", "True or False"]),
        ({"ranks": 2}, ["no argument 'ranks'", "rank"]),
    ],
)
def test_bad_requests_are_refused_in_one_line(options, words):
    with refuses(ConfigError, *words):
        complete(*GOOD, (3, 2), **{"rank": 1, **options})


@pytest.mark.parametrize("shape", ["32", (3.0, 2.0), (3,), 6, ("a", "b")])
def test_shapes_that_are_no_two_sizes_are_refused(shape):
    with refuses(DataError, "shape is", "two sizes"):
        complete(*GOOD, shape, 1)


def test_a_missing_argument_is_named():
    with refuses(ConfigError, "'values'", "it takes rows, cols, values"):
        complete(*GOOD[:2])


def test_keys_of_both_kinds_are_taken():
    for key in (jax.random.key(1), jax.random.PRNGKey(1), None):
        complete(*GOOD, (3, 2), 1, iters=1, key=key)


def test_fractions_of_sweeps_and_ranks_are_refused():
    with refuses(ConfigError, "iters is 2.5", "whole"):
        check_numbers(iters=2.5)
    for rank in (1.5, None, "2"):
        with refuses(ConfigError, f"rank is {rank!r}", "1 to 2"):
            check_rank(rank, (3, 2))


def test_a_mesh_without_a_data_axis_is_refused():
    with refuses(ConfigError, "'rows'", "'data'"):
        complete(*GOOD, (3, 2), 1, mesh=jax.make_mesh((2,), ("rows",)))


def test_rank_above_the_degrees_warns_and_stays_finite():
    with pytest.warns(UserWarning, match="underdetermined"):
        factors = complete(*GOOD, (3, 2), 2, iters=5, solver="exact")
    assert np.isfinite(np.asarray(factors.dense())).all()
    with refuses(DataError, "rows holds 3", "partial_fit"):
        predict(factors, np.array([3]), np.array([0]))
    with refuses(DataError, "cols", "0.5"):
        predict(factors, [0], [0.5])
    with refuses(DataError, "rows", "integers"):
        partial_fit(factors, ["a"], [0], [1.0])
    with refuses(ConfigError, "ridge is -1"):
        partial_fit(factors, [0], [0], [1.0], ridge=-1.0)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_layouts_hold_each_entry_once(data):
    m, n = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 40))
    seen = np.array(data.draw(st.lists(st.booleans(), min_size=m * n, max_size=m * n)))
    rows, cols = np.nonzero(seen.reshape(m, n))
    rows, cols = rows.astype(np.int32), cols.astype(np.int32)
    shards = data.draw(st.sampled_from([1, 2, 8]))
    order = np.random.default_rng(m).permutation(len(rows))
    rows, cols = rows[order], cols[order]
    if not len(rows):
        return
    found = {}
    for bucket in make_buckets(rows, cols, m, n, block_entries=16, shards=shards):
        assert bucket.ids.shape[0] % shards == 0
        ids = np.broadcast_to(np.asarray(bucket.ids)[..., None], bucket.index.shape)
        real = np.asarray(bucket.entry) < len(rows)
        assert (np.asarray(bucket.index)[~real] == n).all()
        for unknown, index, entry in zip(
            ids[real],
            np.asarray(bucket.index)[real],
            np.asarray(bucket.entry)[real],
            strict=True,
        ):
            assert entry not in found
            found[int(entry)] = (int(unknown), int(index))
    assert found == {e: (int(rows[e]), int(cols[e])) for e in range(len(rows))}
    run = make_segments(rows, cols, m, n, shards=shards)
    unknown = np.asarray(run.unknown).ravel()
    assert (np.diff(unknown) >= 0).all()
    entry = np.asarray(run.entry).ravel()
    assert sorted(entry[entry < len(rows)].tolist()) == list(range(len(rows)))


def test_device_arrays_lay_out_like_host_arrays(rng):
    rows, cols = np.nonzero(rng.random((30, 20)) < 0.4)
    rows, cols = rows.astype(np.int32), cols.astype(np.int32)
    host = make_buckets(rows, cols, 30, 20, block_entries=64)
    device = make_buckets(
        jnp.asarray(rows), jnp.asarray(cols), 30, 20, block_entries=64
    )
    for a, b in zip(host, device, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_widths_pad_little_for_skewed_degrees(rng):
    degree = (rng.pareto(1.2, 5000) * 5 + 1).astype(int)
    widths = np.array(choose_widths(degree, 6))
    assert len(widths) <= 6 and widths[-1] >= degree.max()
    area = widths[np.searchsorted(widths, degree)].sum()
    # Powers of two, the usual choice, take more buckets and pad by about 1.4.
    powers = 2.0 ** np.ceil(np.log2(degree))
    assert area < 2 * powers.sum()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 3))
def test_widths_are_the_best_of_all_choices(degree, most):
    degree = np.array(degree)
    widths = choose_widths(degree, most)
    sizes = np.unique(round_up(-(-degree // 4) * 4))
    area = lambda widths: np.array(widths)[np.searchsorted(widths, degree)].sum()
    choices = itertools.combinations(sizes, min(most, len(sizes)))
    assert area(widths) == min(area(c) for c in choices if c[-1] == sizes[-1])
    assert len(widths) <= most


def test_split_partitions_the_entries():
    entries = clean_entries(*GOOD, (3, 2))
    kept, held = split_entries(entries, 0.34, 0)
    assert (kept.size, held.size) == (2, 1)
    both = np.concatenate([kept.values, held.values])
    assert sorted(both.tolist()) == [1.0, 2.0, 3.0]
