"""The kernels of SwiGLU and of its gradient, in triton's interpreter."""

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
from uoe_jax.ops import nvidia, swiglu
from uoe_jax.ops.swiglu import columns


def test_a_program_takes_columns_that_divide_a_side_or_little_more():
    widths = 128, 384, 192, 24, 7, 682, 2048, 1500, 3072
    blocks = [128, 128, 256, 32, 16, 1024, 1024, 1024, 1024]
    assert [columns(width) for width in widths] == blocks


# Of a shut gate; numpy says so, GPUs don't.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("own", ["rows", "factors"])
def test_one_varies_over_the_mesh_and_the_other_does_not(implementation, own, rng):
    """What all devices share is cast, and its gradient summed over them."""
    rows, factors, grad = ops_oracle.draw_swiglu(None, 6, 10)
    if own == "rows":
        rows = rng.normal(size=(2, *rows.shape)).astype(rows.dtype)
    else:
        factors = rng.normal(size=(2, *factors.shape)).astype(factors.dtype)
    places = [P("data") if name == own else P() for name in ("rows", "factors")]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(*places, P()),
        out_specs=(P("data"), *places),
    )
    def step(rows, factors, grad):
        call = lambda rows, factors: swiglu(
            rows.reshape(6, 20), factors.reshape(6), implementation=implementation
        )
        out, vjp = jax.vjp(call, rows, factors)
        return out[None], *vjp(jax.lax.pcast(grad, "data", to="varying"))

    arrays = [jnp.asarray(a) for a in (rows, factors, grad)]
    with nvidia.interpreted(triton_on_cpu.run):
        got = jax.block_until_ready(jax.jit(step)(*arrays))
    each = [rows, [factors] * 2] if own == "rows" else [[rows] * 2, factors]
    out, *want = (
        np.stack(parts)
        for parts in zip(
            *(ops_oracle.swiglu(*call, grad) for call in zip(*each, strict=True)),
            strict=True,
        )
    )
    shared = 1 if own == "rows" else 0
    want[shared] = want[shared].sum(axis=0)
    ops_oracle.assert_near(got, [out, *want], 2.0**-18)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (np.zeros((0, 8), np.float32), "takes no empty arrays"),
        (np.zeros((4, 0), np.float32), "takes no empty arrays"),
        (np.zeros((4, 8)), "takes bfloat16, float16 or float32, not float64"),
    ],
)
def test_what_it_cannot_serve_is_named(rows, reason):
    with (
        jax.enable_x64(True),
        nvidia.interpreted(triton_on_cpu.run),
        pytest.raises(ConfigError, match=reason),
    ):
        swiglu(jnp.asarray(rows), jnp.zeros(len(rows)), implementation="triton")


def test_without_a_gpu_it_says_what_it_needs():
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU, not cpu"):
        swiglu(jnp.zeros((4, 8)), jnp.zeros(4), implementation="triton")
