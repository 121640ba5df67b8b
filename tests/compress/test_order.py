"""Lifts, orders and low ranks beside least squares and eigenvalues in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.compress.low_rank import (
    break_even,
    by_outputs,
    by_weights,
    check_rank,
)
from uoe_jax.compress.order import (
    LEVERAGE_RIDGE,
    best_first,
    cholesky,
    dropping_errors,
    leverage_scores,
    make_lift,
    solve_transposed,
)
from uoe_jax.compress.query_key import kept_pairs, pair_dims, pair_scores
from uoe_jax.compress.value_output import chosen_values, value_basis, value_moment
from uoe_jax.errors import ConfigError
from uoe_jax.ops.rotary import rotate

seeds = st.integers(0, 2**31)


def draw(seed, rows, columns, rank=None):
    """Return rows of unequal, correlated channels."""
    rng = np.random.default_rng(seed)
    inner = rng.normal(size=(rows, rank or columns)) @ rng.normal(
        size=(rank or columns, columns)
    )
    if rank is None:  # well conditioned, so that weights can be compared
        inner = inner / columns**0.5 + rng.normal(size=inner.shape)
    return inner * rng.uniform(0.2, 3, (1, columns)), rng


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_lifted_weights_are_the_least_squares_solution_at_every_width(seed):
    z, rng = draw(seed, 300, 20)
    w = rng.normal(size=(20, 7))
    lift = make_lift(z.T @ z, w, rng.permutation(20), ridge=1e-14)
    errors = lift.errors()
    for k in range(1, 21):
        kept = z[:, lift.order[:k]]
        want = np.linalg.lstsq(kept, z @ w)[0]
        assert np.abs(lift.weights(k) - want).max() < 1e-8 * max(np.abs(want).max(), 1)
        error = np.square(kept @ want - z @ w).sum()
        assert abs(errors[k] - error) < 1e-9 * errors[0]
    assert abs(errors[0] - np.square(z @ w).sum()) < 1e-9 * errors[0]


def test_the_error_is_that_of_the_schur_complement():
    z, rng = draw(3, 200, 16)
    w, moment = rng.normal(size=(16, 5)), z.T @ z
    lift = make_lift(moment, w, np.arange(16), ridge=1e-15)
    for k in (1, 5, 11):
        a, b, c = moment[:k, :k], moment[:k, k:], moment[k:, k:]
        schur = c - b.T @ np.linalg.solve(a, b)
        want = np.trace(w[k:].T @ schur @ w[k:])
        assert abs(lift.errors()[k] - want) < 1e-9 * lift.errors()[0]
        # No better than what one norm allows.
        assert want <= np.linalg.norm(w, 2) ** 2 * np.trace(schur) * (1 + 1e-9)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_fitted_weights_are_never_worse_than_dropping(seed):
    z, rng = draw(seed, 100, 12)
    w, order = rng.normal(size=(12, 4)), rng.permutation(12)
    moment = z.T @ z
    fitted = make_lift(moment, w, order).errors()
    dropped = dropping_errors(moment, w[order], order)
    assert (fitted <= dropped * (1 + 1e-6) + 1e-6 * dropped[0]).all()
    assert (np.diff(fitted) <= 0).all()  # nested sets: each is in the next
    for k in (3, 8):
        lost = z[:, order[k:]] @ w[order[k:]]
        assert abs(dropped[k] - np.square(lost).sum()) < 1e-9 * dropped[0]


def test_a_channel_that_is_there_twice_costs_nothing_to_drop():
    z, rng = draw(5, 100, 8)
    z = np.concatenate([z, z[:, :1] * 2], axis=1)
    w = rng.normal(size=(9, 3))
    exact = make_lift(z.T @ z, w, np.arange(9), ridge=1e-14)
    assert exact.errors()[8] < 1e-10 * exact.errors()[0]
    found = z[:, :8] @ make_lift(z.T @ z, w, np.arange(9)).weights(8)
    assert np.square(found - z @ w).sum() < 1e-10 * np.square(z @ w).sum()


def test_dead_channels_go_first_and_nothing_is_infinite():
    z, rng = draw(6, 60, 10)
    z[:, [2, 7]] = 0
    w = rng.normal(size=(10, 3))
    order = best_first(leverage_scores(z.T @ z))
    assert set(order[-2:]) == {2, 7}
    lift = make_lift(z.T @ z, w, order)
    assert lift.errors()[8] < 1e-6 * lift.errors()[0]
    assert all(np.isfinite(lift.weights(k)).all() for k in range(1, 11))
    nothing = make_lift(np.zeros((4, 4)), w[:4], np.arange(4))
    assert np.isfinite(nothing.weights(2)).all()


def test_a_neuron_that_carries_nearly_everything_is_kept():
    z, _ = draw(7, 80, 12)
    z[:, 4] *= 300
    assert 4 in best_first(leverage_scores(z.T @ z))[:6]


@pytest.mark.parametrize("count", [1, 64, 65, 300])
def test_triangular_systems_are_solved_block_by_block(count):
    rng = np.random.default_rng(count)
    factor = np.tril(rng.normal(size=(count, count))) / count + np.eye(count)
    right = rng.normal(size=(count, 3))
    found = solve_transposed(factor, right)
    assert np.abs(factor.T @ found - right).max() < 1e-10


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([1, 64, 65, 300]))
def test_leverage_scores_are_those_of_the_whole_inverse(seed, count):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, count)) * rng.exponential(size=count)
    moment = x.T @ x  # of low rank from 65 on
    added = LEVERAGE_RIDGE * np.trace(moment) / count
    wanted = np.diag(moment @ np.linalg.inv(moment + added * np.eye(count)))
    assert np.abs(leverage_scores(moment) - wanted).max() < 1e-9


def test_a_factor_in_bfloat16_gives_nearly_the_same_outputs():
    z, rng = draw(8, 400, 40)
    w = rng.normal(size=(40, 9))
    order = best_first(leverage_scores(z.T @ z))
    lift = make_lift(z.T @ z, w, order)
    rounded = np.asarray(lift.factor.astype(jnp.bfloat16), np.float64)
    coarse = lift._replace(factor=rounded)
    for k in (10, 20, 30):
        kept, whole = z[:, order[:k]], z @ w
        pair = [kept @ found.weights(k) - whole for found in (lift, coarse)]
        fine, rough = map(np.linalg.norm, pair)
        assert rough - fine < 1e-2 * fine + 1e-3 * np.linalg.norm(whole)
    assert np.abs(coarse.weights(40) - w[order]).max() < 1e-9  # all: as it was


def test_a_moment_with_rounding_gets_a_ridge_that_suffices():
    z, _ = draw(9, 30, 40, rank=5)
    rounded = (z.T @ z).astype(np.float32).astype(np.float64)
    assert np.linalg.eigvalsh(rounded)[0] < 0
    assert np.isfinite(cholesky(rounded)).all()
    with pytest.raises(np.linalg.LinAlgError):
        cholesky(np.array([[10.0, 0], [0, -9.0]]))


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([1, 3]))
def test_values_lose_the_other_eigenvalues(seed, groups):
    x, rng = draw(seed, 150, 10)
    a = rng.normal(size=(10, 6))
    out = rng.normal(size=(groups, 6, 10))
    basis = value_basis(a.T @ (x.T @ x) @ a, out)
    stacked = np.concatenate(list(out), axis=1)
    whole = x @ a @ stacked
    values = np.sort(np.linalg.eigvalsh(whole.T @ whole))[::-1]
    for r in range(7):
        inner = x @ a @ basis.into[:, :r]
        found = np.concatenate([inner @ o[:r] for o in basis.out], axis=1)
        error = np.square(found - whole).sum()
        assert abs(error - values[r:].sum()) < 1e-9 * values.sum()
        assert abs(error - basis.errors[r]) < 1e-9 * values.sum()
        # The value side alone, as where grouped queries aren't looked at.
        _, vectors = np.linalg.eigh(a.T @ (x.T @ x) @ a)
        keep = vectors[:, ::-1][:, :r]
        alone = np.square(x @ a @ keep @ keep.T @ stacked - whole).sum()
        assert error <= alone * (1 + 1e-9) + 1e-9 * values.sum()


def test_value_moments_hold_the_bias():
    x, rng = draw(2, 50, 6)
    w, b = rng.normal(size=(6, 4)), rng.normal(size=4)
    values = x @ w + b[None]
    found = value_moment(x.T @ x, x.sum(0), 50.0, w, b)
    assert np.abs(found - values.T @ values).max() < 1e-8 * np.abs(found).max()


def test_chosen_values_are_the_best_by_score():
    x, rng = draw(4, 50, 5)
    out, scores = rng.normal(size=(2, 5, 8)), rng.random(5)
    basis = chosen_values(x.T @ x, out, scores)
    best = np.argsort(-scores)
    assert (x @ basis.into == x[:, best]).all() and (basis.out == out[:, best]).all()
    stacked = np.concatenate(list(out), axis=1)
    lost = x[:, best[2:]] @ stacked[best[2:]]
    assert abs(basis.errors[2] - np.square(lost).sum()) < 1e-9 * basis.errors[0]


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([(12, 8), (8, 8), (6, 14)]))
def test_low_ranks_of_outputs_lose_the_tail_and_keep_the_mean(seed, sizes):
    x, rng = draw(seed, 200, sizes[0])
    x = x + rng.normal(size=(1, sizes[0]))
    w, bias = rng.normal(size=sizes), rng.normal(size=sizes[1])
    moment, mean = x.T @ x / 200, x.mean(0)
    plain, svd = by_outputs(moment, w), by_weights(w)
    centred = by_outputs(moment, w, mean, bias)
    y = x @ w
    for r in range(1, min(sizes)):
        found = x @ plain.into[:, :r] @ plain.out[:r]
        error = np.square(found - y).sum() / 200
        assert abs(error - plain.errors()[r]) < 1e-6 * plain.errors()[0]
        other = x @ svd.into[:, :r] @ svd.out[:r]
        assert error <= np.square(other - y).sum() / 200 * (1 + 1e-6) + 1e-9
        found = x @ centred.into[:, :r] @ centred.out[:r] + centred.bias(r, bias)[None]
        wanted = y + bias[None]
        assert np.abs(found.mean(0) - wanted.mean(0)).max() < 1e-6 * np.abs(y).max()
        error = np.square(found - wanted).sum() / 200
        assert abs(error - centred.errors()[r]) < 1e-6 * plain.errors()[0]
        assert error <= plain.errors()[r] + 1e-6 * plain.errors()[0]


def test_a_rank_that_saves_nothing_is_refused():
    assert break_even(576, 1536) == pytest.approx(418.9, abs=0.1)
    check_rank(418, 576, 1536, "mlp.w_up")
    with pytest.raises(ConfigError, match="rank 419 of mlp.w_up.*use 1 to 418"):
        check_rank(419, 576, 1536, "mlp.w_up")
    with pytest.raises(ConfigError, match="use 1 to 3"):  # half of a square is even
        check_rank(4, 8, 8, "wo")


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(0, 3))
def test_scores_bound_what_dropped_pairs_change(seed, shift):
    """|sum of dropped q_i k_i|^2 <= (sum of their scores)^2, rotated or not."""
    rng = np.random.default_rng(seed)
    queries, keys = rng.normal(size=(2, 30, 8)), rng.normal(size=(30, 8))
    scale = rng.uniform(0.1, 3, 8)
    queries, keys = queries * scale, keys * scale[::-1]
    turn = lambda x: np.asarray(
        rotate(jnp.asarray(x)[:, None], shift + jnp.arange(30), 100.0, None)[:, 0]
    )
    rotated = [turn(q) for q in queries], turn(keys)
    squares = np.square(queries).sum(1)[None], np.square(keys).sum(0)[None]
    scores = pair_scores(*squares, rotates=True)
    # Rotation, and where a text begins, change no score.
    after = [np.square(np.stack(rotated[0])).sum(1)[None]]
    after.append(np.square(rotated[1]).sum(0)[None])
    assert (
        np.abs(pair_scores(*after, rotates=True) - scores).max() < 1e-4 * scores.max()
    )
    for count in range(1, 4):
        kept = kept_pairs(scores, count)
        dropped = np.setdiff1d(np.arange(4), kept[0])
        dims = pair_dims(dropped[None], 8, True)[0]
        lost = sum(
            np.square(q[:, dims] @ rotated[1][:, dims].T).sum() for q in rotated[0]
        )
        assert lost <= scores[0, dropped].sum() ** 2 * (1 + 1e-5)
        whole = sum(np.square(q[:, dims] @ keys[:, dims].T).sum() for q in queries)
        assert whole <= scores[0, dropped].sum() ** 2 * (1 + 1e-9)
