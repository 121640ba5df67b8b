"""Grouped products of eight bits by the Triton kernel, in its interpreter."""

from __future__ import annotations

from tests.ops.gpu import triton_on_cpu  # before anything that imports triton

# isort: split
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import test_float8
from uoe_jax.ops import nvidia
from uoe_jax.ops.float8 import float8_products
from uoe_jax.ops.grouped_matmul.nvidia import float8, triton
from uoe_jax.ops.grouped_matmul.nvidia.tiles import Tiles

SMALL = Tiles(16, 16, 16, 2, 4, 2)


@pytest.fixture
def launched(monkeypatch):
    """Kernels in triton's interpreter, in small tiles; their modules and names."""
    monkeypatch.setattr(float8, "choose_tiles", lambda inner, outer: SMALL)
    float8.forward_products.clear_cache()
    seen = []

    def run(kernel, grid, constants, *rest):
        seen.append((kernel.fn.__module__.rpartition(".")[2], kernel.fn.__name__))
        return triton_on_cpu.run(kernel, grid, constants, *rest)

    with nvidia.interpreted(run):
        yield seen


@pytest.mark.parametrize("scales", ["tensor", "rows"])
def test_products_are_of_rounded_operands_and_gradients_of_the_others(
    launched, scales, rng
):
    call = lambda op, *args: getattr(triton, op)(*args)
    test_float8.check_grouped(call, rng, scales, jnp.float32, 1e-5)
    # One a form of the three; its gradients are the kernels of all dtypes.
    assert launched.count(("float8_kernels", "products")) == 3
    assert ("kernels", "weight_grads") in launched


def test_rows_are_stored_at_their_tokens_where_each_has_one(launched, rng):
    rows = jnp.asarray(rng.normal(size=(24, 40)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(2, 40, 24)), jnp.bfloat16)
    ids = jnp.asarray(rng.permutation(24), jnp.int32)
    offsets = jnp.asarray([0, 9, 20], jnp.int32)
    options = {"scales": "rows", "scatter": True}
    got = float8.forward_products(rows, w, offsets, ids, **options)
    rows8, w8 = test_float8.by_hand(rows, (1,)), test_float8.by_hand(w, (1,))
    want = np.concatenate([rows8[:9] @ w8[0], rows8[9:20] @ w8[1], np.zeros((4, 24))])
    test_float8.near(got[ids], want, 2**-8)


def test_gpus_before_ada_round_and_multiply_in_their_own_dtype(launched, monkeypatch):
    monkeypatch.setattr(triton, "multiplies_float8", lambda: False)
    x, w, rows, _, packing = test_float8.packed(1, jnp.float32)
    with float8_products("rows"):
        got = triton.grouped_matmul(rows, w, packing.group_offsets)
    assert launched and ("float8_kernels", "products") not in launched
    rows8, w8 = test_float8.by_hand(rows[:26], (1,)), test_float8.by_hand(w, (1,))
    offsets = np.asarray(packing.group_offsets)
    group = np.searchsorted(offsets[1:], np.arange(26), side="right")
    test_float8.near(got[:26], np.einsum("mi,mio->mo", rows8, w8[group]), 1e-5)
