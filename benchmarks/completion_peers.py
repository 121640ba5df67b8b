"""Completion by installed peers: (seconds so far, test RMSE) as each goes on.

Seconds are CPU seconds of the process, data preparation included, checks left out.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator

import numpy as np

Triple = tuple[np.ndarray, np.ndarray, np.ndarray]
Trace = Iterator[tuple[float, float]]


def rmse(model: np.ndarray, test: Triple) -> float:
    """Return the root mean squared error."""
    return float(np.sqrt(np.mean((np.asarray(model) - test[2]) ** 2)))


def numpy_als(
    train: Triple, test: Triple, shape: tuple, rank: int, ridge: float, power: float
) -> Trace:
    """Plain ALS: one `np.linalg.solve` a row, as in many tutorials; unbiased."""
    begin = time.process_time()
    rows, cols, values = train
    draw, mean = np.random.default_rng(0), values.mean() if power else 0.0
    u = draw.normal(size=(shape[0], rank)).astype(np.float32) / rank**0.5
    v = draw.normal(size=(shape[1], rank)).astype(np.float32) / rank**0.5
    sides = []
    for own, other, size in ((cols, rows, shape[1]), (rows, cols, shape[0])):
        order = np.argsort(own, kind="stable")
        bounds = np.searchsorted(own[order], np.arange(size + 1))
        sides.append((other[order], values[order] - mean, bounds))
    checking = 0.0
    for _ in range(60):
        for side, fixed, solved in ((sides[0], u, v), (sides[1], v, u)):
            index, target, bounds = side
            for j in range(len(solved)):
                part = slice(bounds[j], bounds[j + 1])
                a, b = fixed[index[part]], target[part]
                lam = max(ridge * max(len(b), 1) ** power, 1e-6)
                gram = a.T @ a + lam * np.eye(rank, dtype=np.float32)
                solved[j] = np.linalg.solve(gram, a.T @ b)
        start = time.process_time()
        model = mean + np.einsum("er,er->e", u[test[0]], v[test[1]])
        error = rmse(model, test)
        checking += time.process_time() - start
        yield time.process_time() - begin - checking, error


def soft_impute(
    train: Triple, test: Triple, shape: tuple, rank: int, ridge: float
) -> Trace:
    """fancyimpute's SoftImpute on the dense matrix, one more budget each time."""
    soft = importlib.import_module("fancyimpute.soft_impute")
    # fancyimpute 0.7.0 passes an argument that scikit-learn has since renamed.
    for module in (soft, importlib.import_module("fancyimpute.solver")):
        setattr(module, "check_array", lambda x, force_all_finite: x)  # noqa: B010

    dense = np.full(shape, np.nan)
    dense[train[0], train[1]] = train[2]
    for iters in (25, 50, 100, 200):
        begin = time.process_time()
        sizes = {"max_iters": iters, "max_rank": rank, "shrinkage_value": ridge}
        model = soft.SoftImpute(verbose=False, convergence_threshold=1e-7, **sizes)
        filled = model.fit_transform(dense)
        spent = time.process_time() - begin
        yield spent, rmse(filled[test[0], test[1]], test)


def surprise_svd(train: Triple, test: Triple, rank: int, ridge: float) -> Trace:
    """scikit-surprise's SVD (biased, Cython SGD), one more budget each time."""
    from surprise import SVD, Dataset, Reader

    lines = [(*entry, None) for entry in zip(*(x.tolist() for x in train), strict=True)]
    data = Dataset(Reader(rating_scale=(1, 5))).construct_trainset(lines)
    for epochs in (10, 20, 40, 80):
        begin = time.process_time()
        model = SVD(n_factors=rank, n_epochs=epochs, reg_all=ridge, random_state=0)
        model.fit(data)
        spent = time.process_time() - begin
        pairs = zip(test[0].tolist(), test[1].tolist(), strict=True)
        guess = [model.predict(u, i).est for u, i in pairs]
        yield spent, rmse(np.array(guess), test)


def libmf_epoch(train: Triple, rank: int) -> float:
    """Return the seconds of one LIBMF epoch."""
    from libmf.mf import MF

    pairs, seconds = np.stack(train, axis=1).astype(np.float32), []
    for iters in (1, 6):
        begin = time.process_time()
        MF(k=rank, nr_iters=iters, nr_threads=1, quiet=True).fit(pairs)
        seconds.append(time.process_time() - begin)
    return (seconds[1] - seconds[0]) / 5


def implicit_sweep(train: Triple, shape: tuple, rank: int) -> float:
    """Return the seconds of one iteration of implicit's ALS, 3 CG steps a row."""
    import implicit
    import scipy.sparse

    rows, cols, values = train
    matrix = scipy.sparse.csr_matrix((np.abs(values), (rows, cols)), shape)
    seconds = []
    for iterations in (1, 6):
        sizes = {"factors": rank, "iterations": iterations, "num_threads": 1}
        model = implicit.als.AlternatingLeastSquares(
            **sizes, random_state=0, calculate_training_loss=False
        )
        begin = time.process_time()
        model.fit(matrix, show_progress=False)
        seconds.append(time.process_time() - begin)
    return (seconds[1] - seconds[0]) / 5
