"""Operands rounded to eight bits: the rounding, and products of what was rounded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.errors import ConfigError
from uoe_jax.ops import (
    float8,
    gather_project,
    grouped_matmul,
    pack_choices,
    project_scatter,
)
from uoe_jax.ops.grouped_matmul import batched, serial, xla

E4M3 = ml_dtypes.float8_e4m3fn
to_float8 = jax.jit(float8.to_float8, static_argnames="axes")
rounded = jax.jit(float8.rounded, static_argnames="axes")
seeds = st.integers(0, 2**32 - 1)


def numbers_between():
    """All finite numbers of e4m3, the middles between them, what is beside these."""
    codes = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
    known = np.unique(codes[np.isfinite(codes)])
    middle = (known[1:] + known[:-1]) / 2
    beside = [np.nextafter(middle, np.float32(side)) for side in (-1e9, 1e9)]
    return np.concatenate([known, middle, *beside, [-0.0]]).astype(np.float32)


def test_all_numbers_and_ties_are_rounded_as_the_type_rounds_them():
    x = numbers_between()
    numbers, scale = to_float8(jnp.asarray(x), axes=(0,))
    assert scale.shape == (1,) and float(scale[0]) == 1.0  # the largest is 448
    np.testing.assert_array_equal(bits(numbers), bits(x.astype(E4M3)))
    np.testing.assert_array_equal(rounded(jnp.asarray(x), axes=(0,)), x.astype(E4M3))


def bits(numbers):
    return np.asarray(numbers).view(np.uint8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axes", [(0, 1), (1,), (0,)])
def test_scales_are_the_least_powers_of_two_and_numbers_the_nearest(dtype, axes):
    @settings(deadline=None, max_examples=20)
    @given(seeds)
    def check(seed):
        rng = np.random.default_rng(seed)
        size = np.exp(rng.normal(size=(9, 7)) * rng.uniform(0, 12))
        x = jnp.asarray(rng.normal(size=(9, 7)) * size, dtype)
        numbers, scale = to_float8(x, axes=axes)
        wide, scale = np.asarray(x, np.float64), np.asarray(scale, np.float64)
        most = np.abs(wide).max(axis=axes, keepdims=True)
        assert (np.frexp(scale)[0] == 0.5).all()
        assert (most <= 448 * scale).all() and (most > 224 * scale).all()
        np.testing.assert_array_equal(bits(numbers), bits((wide / scale).astype(E4M3)))
        # Exact in the dtype of x: not rounded a second time.
        back = np.asarray(numbers).astype(np.float64) * scale
        got = rounded(x, axes=axes)
        assert got.dtype == x.dtype
        np.testing.assert_array_equal(np.asarray(got, np.float64), back)

    check()


def test_zeros_extremes_and_numbers_that_are_none():
    most = np.finfo(np.float32).max
    x = np.zeros((7, 4), np.float32)
    x[1] = [1, -2, np.nan, 3]
    x[2] = [np.inf, -np.inf, 5, 448]
    x[3] = [most, -most, 1, 0]
    x[4] = np.asarray([1.75, 0, -1.5, 1.0]) * 2.0**-126  # the least normal ones
    x[5] = [449, 448, -449, 1]
    x[6] = np.nan
    numbers, scale = to_float8(jnp.asarray(x), axes=(1,))
    got, scale = np.asarray(numbers).astype(np.float32), np.asarray(scale)[:, 0]
    assert scale[[0, 6]].tolist() == [1, 1] and not got[0].any()
    np.testing.assert_array_equal(got[1] * scale[1], [1, -2, np.nan, 3])
    np.testing.assert_array_equal(got[2], [np.nan, np.nan, 5, 448])
    assert scale[3] == 2.0**120 and got[3].tolist() == [256, -256, 0, 0]
    assert scale[4] == 2.0**-126 and got[4].tolist() == [1.75, 0, -1.5, 1]
    assert scale[5] == 2 and got[5].tolist() == [224, 224, -224, 0.5]
    assert np.isnan(got[6]).all()


def near(got, want, bound):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.abs(got - want).max() <= bound * np.abs(want).max()


def by_hand(x, axes):
    """x rounded to eight bits, in float64."""
    wide = np.asarray(x, np.float64)
    most = np.abs(wide).max(axis=axes, keepdims=True)
    scale = 2.0 ** np.ceil(np.log2(most / 448))
    return (wide / scale).astype(np.float32).astype(E4M3).astype(np.float64) * scale


@pytest.mark.parametrize("scales", ["tensor", "rows"])
def test_a_product_is_of_rounded_operands_and_its_gradients_of_the_others(scales, rng):
    x, w, grad = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        for shape in ((3, 20, 48), (48, 32), (3, 20, 32))
    )

    def run(x, w, grad):
        with float8.float8_products(scales):
            out, vjp = jax.vjp(float8.matmul, x, w)
        return out, *vjp(grad)

    out, dx, dw = jax.jit(run)(x, w, grad)
    assert {a.dtype.name for a in (out, dx, dw)} == {"bfloat16"}
    flat = x.reshape(60, 48)
    sides = ((0, 1), (0, 1)) if scales == "tensor" else ((1,), (0,))
    want = by_hand(flat, sides[0]) @ by_hand(w, sides[1])
    # A result of bfloat16 is off by 2**-9 of itself; the rounding of operands by more.
    near(out.reshape(60, 32), want, 2**-8)
    x64, w64, g64 = (np.asarray(a, np.float64) for a in (flat, w, grad))
    near(dx.reshape(60, 48), g64.reshape(60, 32) @ w64.T, 2**-8)
    near(dw, x64.T @ g64.reshape(60, 32), 2**-8)
    exact = x64 @ w64
    off = np.abs(np.asarray(out.reshape(60, 32), np.float64) - exact).max()
    assert 2**-7 < off / np.abs(exact).max() < 2**-3


def packed(seed, dtype, spoilt=True):
    """Tokens, their rows and weights of 3 experts, a packing, and gradients.

    The last token's picks count for nothing: their rows are garbage, one of numbers
    far above all others.
    """
    rng = np.random.default_rng(seed)
    choices = np.stack([rng.permutation(3)[:2] for _ in range(14)]).reshape(2, 7, 2)
    kept = np.ones((2, 7, 2), bool)
    kept[1, 6] = False
    packing = pack_choices(jnp.asarray(choices, jnp.int32), 3, jnp.asarray(kept))
    make = lambda *shape: jnp.asarray(rng.normal(size=shape) * 10, dtype)
    x, w, rows, wide = make(14, 16), make(3, 16, 32), make(28, 16), make(28, 32)
    if spoilt:
        rows, wide = (a.at[26].set(jnp.nan).at[27].set(1e6) for a in (rows, wide))
    return x, w, rows, wide, packing


AXES = {"tensor": ((0, 1), (1, 2)), "rows": ((1,), (1,))}
BACKENDS = {
    "blocks one by one": lambda op, *args: getattr(xla, op)(*args, blocks=serial),
    "blocks in batches": lambda op, *args: getattr(xla, op)(*args, blocks=batched),
}


def check_grouped(call, rng, scales, dtype, bound):
    """Hold the three forms of a backend to float64, values and gradients."""
    x, w, rows, wide, packing = packed(rng.integers(2**32), dtype)
    ids, offsets = np.asarray(packing.token_ids), np.asarray(packing.group_offsets)
    group = np.searchsorted(offsets[1:], np.arange(26), side="right")
    place = np.zeros((14, 26))
    place[ids[:26], np.arange(26)] = 1

    def value_and_grads(op, x, *rest):
        *rest, grad = rest

        def run(x, w):
            with float8.float8_products(scales):
                return call(op, x, w, *rest)

        def both(x, w, grad):
            out, vjp = jax.vjp(run, x, w)
            return out, *vjp(grad)

        return jax.jit(both)(x, w, grad)

    row_axes, weight_axes = AXES[scales]
    w8, w64 = by_hand(w, weight_axes), np.asarray(w, np.float64)
    tokens8 = by_hand(x, row_axes)
    rows8 = by_hand(rows[:26], row_axes)
    tokens, own = np.asarray(x, np.float64), np.asarray(rows[:26], np.float64)
    grad64 = np.asarray(wide[:26], np.float64)
    back = np.einsum("mo,mio->mi", grad64, w64[group])
    each = np.eye(3)[group]

    out, dx, dw = value_and_grads("gather_project", x, packing, wide)
    near(out[:26], np.einsum("mi,mio->mo", tokens8[ids[:26]], w8[group]), bound)
    near(dx, place @ back, bound)
    near(dw, np.einsum("me,mi,mo->eio", each, tokens[ids[:26]], grad64), bound)

    out, dx, dw = value_and_grads("grouped_matmul", rows, packing.group_offsets, wide)
    product = np.einsum("mi,mio->mo", rows8, w8[group])
    near(out[:26], product, bound)
    assert not np.asarray(out[26:]).any() and not np.asarray(dx[26:]).any()
    near(dx[:26], back, bound)
    near(dw, np.einsum("me,mi,mo->eio", each, own, grad64), bound)

    out, dx, dw = value_and_grads("project_scatter", rows, packing, wide[:14])
    near(out, place @ product, bound)
    token_grad = np.asarray(wide[:14], np.float64)[ids[:26]]
    near(dx[:26], np.einsum("mo,mio->mi", token_grad, w64[group]), bound)
    near(dw, np.einsum("me,mi,mo->eio", each, own, token_grad), bound)


@pytest.mark.parametrize("scales", ["tensor", "rows"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_products_are_of_rounded_operands_too(backend, scales, rng):
    check_grouped(BACKENDS[backend], rng, scales, jnp.float32, 1e-5)


def test_grouped_products_of_bfloat16_are_rounded_no_more_than_once(rng):
    check_grouped(BACKENDS["blocks one by one"], rng, "rows", jnp.bfloat16, 2**-7)


def test_a_backend_that_rounds_nothing_says_so():
    x, w, rows, _, packing = packed(0, jnp.float32)
    offsets, by = packing.group_offsets, {"implementation": "reference"}
    with float8.float8_products("rows"):
        for call in (
            lambda: grouped_matmul(rows, w, offsets, **by),
            lambda: gather_project(x, w, packing, **by),
            lambda: project_scatter(rows, w, packing, **by),
        ):
            with pytest.raises(ConfigError, match="aren't rounded to eight bits"):
                call()
