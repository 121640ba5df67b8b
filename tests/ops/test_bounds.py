from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uoe_jax.ops import segment_attention

pytestmark = pytest.mark.both_jax

ROWS = 96


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_bounds_are_finer_segments(implementation, causal, seed):
    """Documents inside segments: value and gradients of cutting the segments there."""
    rng = np.random.default_rng(seed)
    coarse = np.sort(rng.integers(0, ROWS, 3))
    fine = np.sort(np.concatenate([coarse, rng.integers(0, ROWS, 6)]))
    coarse, fine = (np.concatenate([[0], cut, [ROWS]]) for cut in (coarse, fine))
    owner = np.searchsorted(fine, np.arange(ROWS), side="right") - 1
    bounds = tuple(
        jnp.asarray(x, jnp.int32) for x in (fine[owner], fine[owner + 1] - 1)
    )
    shapes = (ROWS, 2, 16), (ROWS, 16), (ROWS, 16), (ROWS, 2, 16)
    q, k, v, grad = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)

    def run(cut, bounds, implementation):
        attend = lambda q, k, v: segment_attention(
            q,
            k,
            v,
            jnp.asarray(cut, jnp.int32),
            causal=causal,
            bounds=bounds,
            implementation=implementation,
        )
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(grad)

    want = run(fine, None, "reference")
    for got, expected in zip(run(coarse, bounds, implementation), want, strict=True):
        # Sums of up to 96 products in float32.
        np.testing.assert_allclose(got, expected, atol=5e-6, rtol=0)
