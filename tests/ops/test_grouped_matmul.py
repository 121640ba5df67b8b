from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops import ops_oracle
from uoe_jax.ops import pack_choices
from uoe_jax.ops.grouped_matmul import api, batched, reference, serial, xla

pytestmark = pytest.mark.both_jax

ROWS, GROUPS, INS, OUTS = 70, 5, 24, 40
BLOCKS = {"serial": serial, "batched": batched}
# Sums of up to 70 products in float32.
TOLERANCE = 5e-6


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks a group, several groups a batch, and one that does not fit."""
    monkeypatch.setattr(serial, "_BLOCK", 16)
    monkeypatch.setattr(batched, "_BLOCK", 4)
    monkeypatch.setattr(batched, "_BATCH", 6)


def backend(op, name):
    if name == "reference":
        return getattr(reference, op)
    return functools.partial(getattr(xla, op), blocks=BLOCKS[name])


def draw(rng, *shapes, dtype=np.float32):
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def value_and_grads(fun, *args):
    *args, grad = args
    out, vjp = jax.vjp(fun, *args)
    return out, *vjp(grad)


cuts = st.lists(st.integers(0, ROWS), min_size=GROUPS, max_size=GROUPS).map(sorted)


@pytest.mark.parametrize("name", ["reference", *BLOCKS])
def test_value_and_gradients_match_float64(name):
    @jax.jit
    def run(x, w, grad, offsets):
        fun = backend("grouped_matmul", name)
        return value_and_grads(lambda x, w: fun(x, w, offsets), x, w, grad)

    @settings(deadline=None, max_examples=25)
    @given(cuts, st.integers(0, 2**32 - 1))
    def check(cuts, seed):
        rng = np.random.default_rng(seed)
        x, w, grad = draw(rng, (ROWS, INS), (GROUPS, INS, OUTS), (ROWS, OUTS))
        offsets = [0, *cuts]
        # What lies past the last group is never read.
        if name != "reference":
            x, grad = (a.at[offsets[-1] :].set(jnp.nan) for a in (x, grad))
        got = run(x, w, grad, jnp.asarray(offsets))
        want = ops_oracle.grouped(x, w, offsets, grad)
        ops_oracle.assert_near(got, want, TOLERANCE)

    check()


@pytest.mark.parametrize("name", ["reference", *BLOCKS])
def test_gather_and_scatter_match_float64(name):
    rng = np.random.default_rng()
    score = rng.random((2, 9, GROUPS)) + np.arange(GROUPS) / 3
    choices = np.argsort(score, axis=-1)[..., :2].astype(np.int32)
    packing = pack_choices(jnp.asarray(choices), GROUPS)
    ids, offsets = (np.asarray(packing[i]) for i in (0, 3))
    matrix = np.zeros((36, 18))
    matrix[np.arange(36), ids] = 1  # row <- token
    x, w, grad = draw(rng, (18, INS), (GROUPS, INS, OUTS), (36, OUTS))
    fun = backend("gather_project", name)
    got = value_and_grads(lambda x, w: fun(x, w, packing), x, w, grad)
    out, dx, dw = ops_oracle.grouped(matrix @ np.asarray(x), w, offsets, grad)
    ops_oracle.assert_near(got, (out, matrix.T @ dx, dw), TOLERANCE)

    rows, grad = draw(rng, (36, INS), (18, OUTS))
    fun = backend("project_scatter", name)
    got = value_and_grads(lambda x, w: fun(x, w, packing), rows, w, grad)
    out, dx, dw = ops_oracle.grouped(rows, w, offsets, matrix @ np.asarray(grad))
    ops_oracle.assert_near(got, (matrix.T @ out, dx, dw), TOLERANCE)


@pytest.mark.parametrize("name", list(BLOCKS))
def test_bfloat16_is_summed_in_float32(name):
    rng = np.random.default_rng()
    shapes = (ROWS, INS), (GROUPS, INS, OUTS), (ROWS, OUTS)
    x, w, grad = draw(rng, *shapes, dtype=jnp.bfloat16)
    offsets = [0, 0, 30, 31, 60, ROWS]
    fun = backend("grouped_matmul", name)
    got = value_and_grads(lambda x, w: fun(x, w, jnp.asarray(offsets)), x, w, grad)
    assert {a.dtype for a in got} == {jnp.dtype("bfloat16")}
    want = ops_oracle.grouped(x, w, offsets, grad)
    # Only the result is rounded: half a step of 2^-8.
    ops_oracle.assert_near(got, want, 2**-8)


def test_weights_are_not_copied_once_per_block():
    x, w = jnp.zeros((4096, 64)), jnp.zeros((GROUPS, 64, 32))
    offsets = jnp.arange(GROUPS + 1) * 800

    def grads(x, w):
        fun = backend("grouped_matmul", "serial")
        return jax.grad(lambda x, w: fun(x, w, offsets).sum(), (0, 1))(x, w)

    # Nothing is larger than the rows themselves.
    assert ops_oracle.largest_result(grads, x, w) == x.size


def test_no_rows_give_no_rows():
    out = api.grouped_matmul(jnp.zeros((0, 3)), jnp.zeros((2, 3, 4)), jnp.zeros(3, int))
    assert out.shape == (0, 4)
