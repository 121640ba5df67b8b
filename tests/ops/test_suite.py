"""All backends of all operations give the float64 answers: see tests/ops/suite.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import suite
from tests.ops.cases import every
from uoe_jax import ops
from uoe_jax.errors import ConfigError

CASES = every()
# The shipped backend of any device, in float32.
PLAIN = [c for c in CASES if (c.backend, c.dtype) == ("xla", "float32")]
BATCHED = [
    case
    for case in PLAIN
    if case.operation not in suite.DECODED and "window" not in case.about
]
SEEING = [
    case
    for case in CASES
    if case.operation == "segment_attention" and not case.backend.startswith("mosaic")
]


def of(cases):
    return [pytest.param(case, id=str(case), marks=case.marks) for case in cases]


@pytest.mark.parametrize("case", of(CASES))
def test_values_and_gradients_match_float64(case, capfd):
    case.check()
    assert "RACE DETECTED" not in capfd.readouterr().out  # of Mosaic's interpreter


def test_every_backend_is_held_or_says_what_it_needs():
    named = {(op, name) for op, table in suite.TABLES.items() for name in table}
    held = {(case.operation, case.backend) for case in every()}
    assert named == held | suite.ELSEWHERE.keys()
    x = jnp.zeros((1, 8, 1, 64), jnp.bfloat16)
    for (operation, name), reason in suite.ELSEWHERE.items():
        with pytest.raises(ConfigError, match=reason):
            getattr(ops, operation)(x, x, x, causal=True, implementation=name)


@pytest.mark.parametrize("case", of(BATCHED))
def test_a_batch_is_each_of_its_calls(case):
    """Under vmap; offsets and packings differ between the calls."""
    with case.running():
        problems = [case.problem(seed) for seed in (0, 1)]
        stack = lambda *a: jnp.stack([jnp.asarray(x) for x in a])
        whole = jax.tree.map(stack, *(p[:3] for p in problems))
        outs, grads = jax.jit(jax.vmap(case.value_and_gradients()))(*whole)
    for i, problem in enumerate(problems):
        case.compare(problem, [a[i] for a in outs], tuple(a[i] for a in grads))


@pytest.mark.parametrize("case", of(SEEING))
def test_a_row_moves_only_those_that_see_it(case, rng):
    """Later rows, other segments, documents and windows keep every bit."""
    q, k, v, *sink = case.problem(0).arrays
    rest = (*sink, *case.problem(0).rest)
    run = jax.jit(lambda *arrays: case.call(*arrays, *rest))
    row = int(rng.integers(k.shape[0] // 2, k.shape[0] * 3 // 4))
    moved = [a.copy() for a in (k, v)]
    for array in moved:
        array[row] += 3
    with case.running():
        before, after = (np.asarray(run(q, *kv)) for kv in ((k, v), moved))
    offsets, bounds = rest[-2:]
    rows = np.arange(k.shape[0])
    low, high = (0, rows[-1]) if bounds is None else bounds
    own = np.searchsorted(offsets[1:], rows, side="right")
    causal, window = case.sizes["mask"]
    sees = (low <= row) & (row <= high) & (own == own[row])
    sees &= (rows >= row) | (not causal)
    sees &= np.abs(rows - row) < (window or rows.size)
    # Queries past the last segment are NaN, and their results zeros.
    changed = (before != after).any(axis=(1, 2))
    assert changed[row] and not changed[~sees].any()


@pytest.mark.parametrize("operation", ["segment_attention", "grouped_matmul", "swiglu"])
def test_no_rows_give_no_rows(operation):
    case = next(case for case in PLAIN if case.operation == operation)
    problem = case.problem(0)
    arrays = list(problem.arrays)
    rows = arrays[0].shape[0]
    arrays = [a[:0] if a.shape[0] == rows else a for a in arrays]
    out = case.call(
        *map(jnp.asarray, arrays), *jax.tree.map(np.zeros_like, problem.rest)
    )
    assert out.shape == (0, *problem.want[0].shape[1:])
