"""Grouped products of eight bits by the Triton kernel, in its interpreter."""

from __future__ import annotations

from tests.ops.gpu import triton_on_cpu  # before anything that imports triton

# isort: split
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import test_float8
from uoe_jax.ops import nvidia
from uoe_jax.ops.float8 import float8_products
from uoe_jax.ops.grouped_matmul.nvidia import float8, triton
from uoe_jax.ops.grouped_matmul.nvidia.tiles import Tiles

SMALL = Tiles(16, 16, 16, 2, 4, 2)
IN_TURN = SMALL._replace(in_turn=1)
KERNELS = {"products": SMALL, "products_in_turn": IN_TURN}


@pytest.fixture(params=KERNELS)
def kernel(request):
    """The kernel of eight bits that is launched."""
    return request.param


@pytest.fixture
def launched(monkeypatch, kernel):
    """Kernels in triton's interpreter, in small tiles; their modules and names."""
    monkeypatch.setattr(float8, "choose_tiles", lambda *shape: KERNELS[kernel])
    float8.forward_products.clear_cache()
    float8.multiply.clear_cache()
    seen = []

    def run(kernel, grid, constants, *rest):
        seen.append((kernel.fn.__module__.rpartition(".")[2], kernel.fn.__name__))
        return triton_on_cpu.run(kernel, grid, constants, *rest)

    with nvidia.interpreted(run):
        yield seen


@pytest.mark.parametrize("scales", ["tensor", "rows"])
def test_products_are_of_rounded_operands_and_gradients_of_the_others(
    launched, kernel, scales, rng
):
    call = lambda op, *args: getattr(triton, op)(*args)
    test_float8.check_grouped(call, rng, scales, jnp.float32, 1e-5)
    # One a form of the three; its gradients are the kernels of all dtypes.
    assert launched.count(("float8_kernels", kernel)) == 3
    assert ("kernels", "weight_grads") in launched


def test_a_token_is_rounded_once_however_many_experts_it_has(launched, rng):
    """As the model does it: eight times fewer entries than packed rows at 8 picks."""
    x, w, _, _, packing = test_float8.packed(2, jnp.bfloat16)

    def run(x, w):
        with float8_products("rows"):
            return triton.gather_project(x, w, packing)

    text = jax.jit(run).lower(x, w).as_text()
    made = re.findall(r"convert .*-> tensor<([\dx]+)xf8E4M3FN>", text)
    assert sorted(made) == ["14x16", "3x16x32"]
    # The weight's bytes are transposed, not what they are rounded from.
    moved = re.findall(r"transpose .*-> tensor<[\dx]+x(\w+)>", text)
    assert moved == ["f8E4M3FN"] and text.count("@LayoutConstraint") == 1


def test_tiles_read_as_many_bytes_as_those_of_16_bits(monkeypatch):
    known = lambda op, shape: SMALL._replace(inner=shape["inner"])
    monkeypatch.setattr(float8, "tiles_of_all", known)
    assert float8.choose_tiles(64, 2, 128, 48, True).inner == 128
    monkeypatch.undo()
    monkeypatch.setattr(nvidia, "shared_memory", lambda: nvidia.SHARED_MEMORY[9.0])
    for inner, outer in ((16, 16), (2048, 768), (48, 80)):
        tiles = float8.choose_tiles(512, 4, inner, outer, False)
        # Instructions of eight bits are 32 deep.
        assert tiles.inner >= 32 and tiles.inner < 2 * max(inner, 32)


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
    assert launched and "float8_kernels" not in dict(launched)
    rows8, w8 = test_float8.by_hand(rows[:26], (1,)), test_float8.by_hand(w, (1,))
    offsets = np.asarray(packing.group_offsets)
    group = np.searchsorted(offsets[1:], np.arange(26), side="right")
    test_float8.near(got[:26], np.einsum("mi,mio->mo", rows8, w8[group]), 1e-5)
