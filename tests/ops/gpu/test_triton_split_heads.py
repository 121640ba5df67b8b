"""The kernels that split and join heads, in triton's interpreter and compiled."""

from __future__ import annotations

import triton_on_cpu  # before anything that imports triton

# isort: split
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import ops_oracle
import pytest
from jax.sharding import PartitionSpec as P
from test_split_heads import ATOL, THETA, check

from uoe_jax.errors import ConfigError
from uoe_jax.ops import _triton, split_heads

FORCED = {"theta": THETA, "implementation": "triton"}


# Rows that fill one program, a part of one, and two and a part.
@pytest.mark.parametrize(
    ("rows", "kv_heads", "groups", "width"),
    [(32, 1, 1, 16), (5, 2, 1, 32), (70, 1, 3, 16), (40, 3, 2, 16)],
)
def test_value_and_gradient_match_float64(rows, kv_heads, groups, width):
    call = ops_oracle.draw_heads(None, 11, rows, kv_heads, groups, width)
    with _triton.interpreted(triton_on_cpu.run):
        check(call, kv_heads=kv_heads, groups=groups, **FORCED)


def test_bfloat16_is_rounded_once():
    call = ops_oracle.draw_heads(None, 11, 40, 2, 2, 16, jnp.bfloat16)
    with _triton.interpreted(triton_on_cpu.run):
        # A step of 8 bits at values up to 8: the interpreter cuts off, a GPU rounds.
        check(call, atol=2.0**-5, kv_heads=2, groups=2, **FORCED)


def test_devices_of_a_mesh_split_their_own_rows():
    calls = [ops_oracle.draw_heads(None, 11, 40, 2, 1, 16) for _ in range(2)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *calls)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    alone = threading.Lock()

    def run(*args):
        with alone:  # the interpreter serves one device at a time
            return triton_on_cpu.run(*args)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    def step(call):
        rows, positions, ids, grads = jax.tree.map(lambda a: a[0], call)
        split = lambda rows: split_heads(
            rows, positions, ids, kv_heads=2, groups=1, **FORCED
        )
        out, vjp = jax.vjp(split, rows)
        return jax.tree.map(lambda a: a[None], (*out, *vjp(grads)))

    with _triton.interpreted(run):
        got = jax.block_until_ready(jax.jit(step)(stack))
    for place, call in enumerate(calls):
        want = ops_oracle.split_heads(*call, kv_heads=2, groups=1, theta=THETA)
        for mine, exact in zip(got, want, strict=True):
            np.testing.assert_allclose(mine[place], exact, atol=ATOL)


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
        _triton.interpreted(triton_on_cpu.run),
        pytest.raises(ConfigError, match=reason),
    ):
        split_heads(rows, ids, ids, kv_heads=1, groups=1, **options)


def test_without_a_gpu_it_says_what_it_needs():
    rows, ids = jnp.zeros((4, 48)), jnp.zeros(4, jnp.int32)
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU, not cpu"):
        split_heads(rows, ids, ids, kv_heads=1, groups=1, **FORCED)
