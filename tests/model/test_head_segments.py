"""Segments of several heads in a run, and those of rows that nothing reads."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.model.attention import UNUSED, head_offsets

ROWS = 2 * UNUSED + 300
find = jax.jit(head_offsets, static_argnums=(1, 2))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, ROWS), min_size=3, max_size=3).map(sorted))
def test_every_head_has_the_segments_and_small_ones_behind(cuts):
    """Of half a million rows without an expert one segment would cost the square."""
    offsets = np.array([0, *cuts], np.int32)
    found = np.asarray(find(jnp.asarray(offsets), ROWS, 3))
    assert found[-1] == 3 * ROWS and np.all(np.diff(found) >= 0)
    each = found[:-1].reshape(3, -1) - ROWS * np.arange(3)[:, None]
    for mine in each:
        np.testing.assert_array_equal(mine[: len(offsets)], offsets)
        behind = np.diff([*mine[len(offsets) - 1 :], ROWS])
        assert behind.max() <= UNUSED
