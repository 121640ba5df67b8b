"""Per-pick values in packed order, and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uoe_jax.model.linear import picks_to_rows, rows_to_picks
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
def test_placing_is_a_permutation_and_its_gradient_the_way_back(dropped, cut):
    packing, values = draw(np.random.SeedSequence().entropy % 2**32, dropped, cut)
    values = jnp.asarray(values, jnp.float32)
    rows, back = jax.vjp(lambda v: picks_to_rows(v, packing), values)
    ids = np.asarray(packing.row_ids)
    inside = ids < rows.shape[0]
    expected = np.zeros(rows.shape, np.float32)
    expected[ids[inside]] = np.asarray(values)[inside]
    np.testing.assert_array_equal(rows, expected)
    grad = jnp.asarray(np.random.default_rng().normal(size=rows.shape), jnp.float32)
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
