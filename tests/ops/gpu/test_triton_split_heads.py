"""The kernels that split and join heads, in triton's interpreter and compiled."""

from __future__ import annotations

from tests.ops.gpu import triton_on_cpu  # before anything that imports triton

# isort: split
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.ops import ops_oracle
from uoe_jax.errors import ConfigError
from uoe_jax.ops import nvidia, split_heads

THETA = 100.0
# Of values up to 5, turned by up to 500 radians in float32, two roundings.
ATOL = 5 * 500 * 2.0**-23
FORCED = {"theta": THETA, "implementation": "triton"}


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_rows_of_all_devices_at_positions_of_each(implementation, rng):
    """What varies over the mesh is cast, and the rows' gradient summed over it."""
    rows, _, ids, grads = ops_oracle.draw_heads(None, 11, 40, 2, 1, 16)
    places = rng.integers(0, 500, (2, 11)).astype(np.int32)
    options = {"kv_heads": 2, "groups": 1, "theta": THETA}
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("data"), P(), P()),
        out_specs=(P("data"), P()),
    )
    def step(rows, places, ids, grads):
        split = lambda rows: split_heads(
            rows, places[0], ids, implementation=implementation, **options
        )
        out, vjp = jax.vjp(split, rows)
        grads = jax.tree.map(lambda a: jax.lax.pcast(a, "data", to="varying"), grads)
        return jax.tree.map(lambda a: a[None], out), *vjp(grads)

    with nvidia.interpreted(triton_on_cpu.run):
        arrays = jax.tree.map(jnp.asarray, (rows, places, ids, grads))
        out, d_rows = jax.block_until_ready(jax.jit(step)(*arrays))
    want = [ops_oracle.split_heads(rows, p, ids, grads, **options) for p in places]
    for mine, *exact in zip(out, *(parts[:3] for parts in want), strict=True):
        np.testing.assert_allclose(mine, np.stack(exact), atol=ATOL)
    np.testing.assert_allclose(d_rows, want[0][3] + want[1][3], atol=2 * ATOL)


@pytest.mark.parametrize(
    ("width", "theta", "reason"),
    [
        (24, THETA, "powers of two from 16 on, not 24"),
        (8, THETA, "powers of two from 16 on, not 8"),
        (16, None, "only splits what it rotates"),
    ],
)
def test_what_it_cannot_serve_is_named(width, theta, reason):
    rows, ids = jnp.zeros((4, 3 * width)), jnp.zeros(4, jnp.int32)
    options = FORCED | {"theta": theta}
    with (
        nvidia.interpreted(triton_on_cpu.run),
        pytest.raises(ConfigError, match=reason),
    ):
        split_heads(rows, ids, ids, kv_heads=1, groups=1, **options)


def test_without_a_gpu_it_says_what_it_needs():
    rows, ids = jnp.zeros((4, 48)), jnp.zeros(4, jnp.int32)
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU, not cpu"):
        split_heads(rows, ids, ids, kv_heads=1, groups=1, **FORCED)
