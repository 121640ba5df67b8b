"""Per-pick values in packed order, and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uoe_jax.model.layers import picks_to_rows, rows_to_picks
from uoe_jax.ops.numerics import scale_rows
from uoe_jax.ops.packing import Packing, pack_choices

BATCH, LENGTH, EXPERTS, PICKS = 2, 13, 6, 3


def draw(seed: int, dropped: float, cut: int) -> tuple[Packing, np.ndarray]:
    """Return a packing, some picks of which don't count, and values of its picks."""
    rng = np.random.default_rng(seed)
    choices = np.argsort(rng.random((BATCH, LENGTH, EXPERTS)), axis=-1)[..., :PICKS]
    kept = rng.random(choices.shape) >= dropped
    rows = choices.size - cut * int((~kept).sum())
    packing = pack_choices(jnp.asarray(choices), EXPERTS, jnp.asarray(kept), rows)
    return packing, rng.normal(size=(BATCH * LENGTH, PICKS, 2))


@pytest.mark.parametrize(
    ("dropped", "cut"), [(0.0, 0), (0.3, 0), (0.3, 1)], ids=["all", "dropped", "cut"]
)
def test_placing_is_a_permutation_and_its_gradient_the_way_back(dropped, cut, rng):
    packing, values = draw(int(rng.integers(2**32)), dropped, cut)
    values = jnp.asarray(values, jnp.float32)
    rows, back = jax.vjp(lambda v: picks_to_rows(v, packing), values)
    ids = np.asarray(packing.row_ids)
    inside = ids < rows.shape[0]
    expected = np.zeros(rows.shape, np.float32)
    expected[ids[inside]] = np.asarray(values)[inside]
    np.testing.assert_array_equal(rows, expected)
    grad = jnp.asarray(rng.normal(size=rows.shape), jnp.float32)
    (found,) = back(grad)
    np.testing.assert_array_equal(found, rows_to_picks(grad, packing))
    wanted = np.where(inside[..., None], np.asarray(grad)[np.where(inside, ids, 0)], 0)
    np.testing.assert_array_equal(found, wanted)


def test_no_gradient_is_scattered():
    packing, values = draw(0, 0.0, 0)
    total = lambda v: jnp.sum(picks_to_rows(v, packing) ** 2)
    text = str(jax.make_jaxpr(jax.grad(total))(jnp.asarray(values)))
    assert "scatter-add" not in text
    assert "scatter" in text  # the integers that say where each pick went


@pytest.mark.parametrize("shape", [(40, 96), (3, 40, 2, 16)])
def test_gradients_of_factors_are_summed_in_float32(shape, rng):
    """In bfloat16 sums over several heads lost two of their eight bits."""
    rows, grad = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for _ in range(2))
    axis = shape.index(40)
    sides = [side if place == axis else 1 for place, side in enumerate(shape)]
    factors = jnp.asarray(rng.normal(size=sides), jnp.float32)
    out, back = jax.vjp(scale_rows, rows, factors)
    d_rows, d_factors = back(grad)
    rounded = factors.astype(jnp.bfloat16)
    np.testing.assert_array_equal(out, rows * rounded)
    np.testing.assert_array_equal(d_rows, grad * rounded)
    others = tuple(place for place in range(len(shape)) if place != axis)
    terms = np.asarray(rows, np.float64) * np.asarray(grad, np.float64)
    assert d_factors.dtype == jnp.float32
    np.testing.assert_allclose(
        d_factors,
        terms.sum(axis=others, keepdims=True),
        atol=1e-6 * np.abs(terms).sum(axis=others).max(),
    )
