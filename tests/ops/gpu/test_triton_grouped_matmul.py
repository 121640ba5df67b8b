from __future__ import annotations

import triton_on_cpu  # before anything that imports triton

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import ops_oracle
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from uoe_jax.ops import _triton, _tuning, pack_choices
from uoe_jax.ops.grouped_matmul import triton

ROWS, GROUPS, INS, OUTS = 40, 3, 20, 24
# Three tf32 products in the interpreter are one of float32.
TOLERANCE = 5e-6
TILE = triton.Tiles(16, 16, 16, 2, 4, 2)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """The kernels on numpy arrays, in tiles that no side fills."""
    monkeypatch.setattr(triton, "choose_tiles", lambda op, shape: TILE)
    with _triton.interpreted(triton_on_cpu.run):
        yield


def draw(rng, *shapes, dtype=np.float32):
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def value_and_grads(fun, *args):
    *args, grad = args
    out, vjp = jax.vjp(fun, *args)
    return out, *vjp(grad)


cuts = st.lists(st.integers(0, ROWS), min_size=GROUPS, max_size=GROUPS).map(sorted)


@settings(deadline=None, max_examples=3)
@given(cuts, st.integers(0, 2**32 - 1))
@example([0, 17, 33], 0)  # an empty group, two that end inside tiles, rows of none
def test_value_and_gradients_match_float64(cuts, seed):
    rng = np.random.default_rng(seed)
    x, w, grad = draw(rng, (ROWS, INS), (GROUPS, INS, OUTS), (ROWS, OUTS))
    offsets = [0, *cuts]
    # What lies past the last group is never read.
    x, grad = (a.at[offsets[-1] :].set(jnp.nan) for a in (x, grad))
    product = lambda x, w: triton.grouped_matmul(x, w, jnp.asarray(offsets))
    got = value_and_grads(product, x, w, grad)
    ops_oracle.assert_near(got, ops_oracle.grouped(x, w, offsets, grad), TOLERANCE)


def routed(dtype, seed=0):
    """A packing of 18 tokens' two experts, the last two tokens' picks left out."""
    rng = np.random.default_rng(seed)
    score = rng.random((2, 9, GROUPS)) + np.arange(GROUPS) / 3
    choices = jnp.asarray(np.argsort(score, axis=-1)[..., :2], jnp.int32)
    kept = (jnp.arange(18) < 16).reshape(2, 9, 1) & jnp.ones((2, 9, 2), bool)
    packing = pack_choices(choices, GROUPS, kept, num_rows=32)
    matrix = np.zeros((32, 18))
    matrix[np.arange(32), np.asarray(packing.token_ids)] = 1  # row <- token
    arrays = draw(
        rng, (18, INS), (GROUPS, INS, OUTS), (32, OUTS), (32, INS), (18, OUTS),
        dtype=dtype,
    )  # fmt: skip
    return packing, matrix, arrays


@pytest.mark.parametrize(
    ("dtype", "summed", "tolerance"),
    # Both ways of summing a token's rows. The interpreter cuts bfloat16 off where a GPU
    # rounds: a whole step of 2^-8 for each of two rows and their sum.
    [
        ("float32", False, TOLERANCE),
        ("float32", True, TOLERANCE),
        ("bfloat16", False, 3 * 2**-8),
    ],
)
def test_gather_and_scatter_match_float64(monkeypatch, dtype, summed, tolerance):
    found = TILE._asdict() if summed else None
    monkeypatch.setattr(_tuning, "tiles", lambda op, shape: found)
    packing, matrix, (x, w, grad, rows, token_grad) = routed(dtype)
    offsets = np.asarray(packing.group_offsets)
    wide = lambda a: np.asarray(a, np.float64)

    got = value_and_grads(lambda x, w: triton.gather_project(x, w, packing), x, w, grad)
    out, dx, dw = ops_oracle.grouped(matrix @ wide(x), w, offsets, grad)
    ops_oracle.assert_near(got, (out, matrix.T @ dx, dw), tolerance)

    got = value_and_grads(
        lambda x, w: triton.project_scatter(x, w, packing), rows, w, token_grad
    )
    out, dx, dw = ops_oracle.grouped(rows, w, offsets, matrix @ wide(token_grad))
    ops_oracle.assert_near(got, (matrix.T @ out, dx, dw), tolerance)
    assert {a.dtype for a in got} == {jnp.dtype(dtype)}
