"""The Triton attention kernels without a GPU: their interpreter, and their dispatch."""

from __future__ import annotations

import functools
from types import SimpleNamespace

from tests.ops.gpu import triton_on_cpu  # before anything that imports triton

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.ops import cases, ops_oracle
from uoe_jax.errors import ConfigError
from uoe_jax.ops import nvidia, segment_attention
from uoe_jax.ops.segment_attention.call import Call, Mask
from uoe_jax.ops.segment_attention.nvidia import triton

ROWS, SEGMENTS, SCALE = 44, 3, 0.3
FLOAT16 = pytest.mark.float16

backwards = False  # whether programs take the tiles in the opposite order


def run(kernel, grid, constants, shapes, *arrays):
    """The arrays that a kernel writes, NaN where it writes nothing."""
    arrays = [np.asarray(a) for a in arrays]
    if backwards:
        place = kernel.arg_names.index("tiles")
        arrays[place] = arrays[place][::-1]
    return triton_on_cpu.run(kernel, grid, constants, shapes, *arrays)


@pytest.fixture
def on_cpu(monkeypatch):
    """The kernels on numpy arrays, in tiles that no segment fills."""
    tiles = cases.ATTENTION_TILES
    monkeypatch.setattr(triton, "choose_tiles", lambda kernel, shape: tiles[kernel])
    with nvidia.interpreted(run):
        yield


def draw(rng, groups, width, dtype):
    shapes = (ROWS, groups, width), (ROWS, width), (ROWS, width), (ROWS, groups, width)
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


@functools.partial(jax.jit, static_argnames=("causal", "window"))
def value_and_grads(q, k, v, grad, offsets, bounds, causal, window):
    def attend(q, k, v):
        mask = Mask(causal, window)
        return triton.segment_attention(Call(q, k, v, offsets, mask, SCALE, bounds))

    out, vjp = jax.vjp(attend, q, k, v)
    return out, *vjp(grad)


@FLOAT16
def test_no_bit_depends_on_the_order_of_programs(on_cpu, monkeypatch, rng):
    """No sum is shared by programs, so a GPU may run them in any order."""
    arrays = draw(rng, 2, 16, "float16")
    args = *arrays, jnp.asarray([0, 5, 5, 40]), None, True, None
    got = jax.block_until_ready(value_and_grads(*args))
    monkeypatch.setitem(globals(), "backwards", True)
    for a, b in zip(got, value_and_grads(*args), strict=True):
        np.testing.assert_array_equal(a, b)


@FLOAT16
def test_vmap_inside_shard_map_matches_float64(on_cpu, rng):
    cuts = ([0, 9, 9, 30], [0, 40, 44, 44])
    batch = [draw(rng, 1, 16, "float16") for _ in cuts]
    call = functools.partial(value_and_grads, bounds=None, causal=True, window=None)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        jax.vmap(call), mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    got = jax.jit(sharded)(*map(jnp.stack, zip(*batch, strict=True)), jnp.asarray(cuts))
    for i, offsets in enumerate(cuts):
        visible = ops_oracle.segment_visible(offsets, ROWS, True, None)
        want = ops_oracle.attention(*batch[i], visible, SCALE)
        ops_oracle.assert_near([x[i] for x in got], want, 1.5 * 2**-10)


def pretend(monkeypatch, backend, capability):
    """Make this machine's first device one of another kind."""
    device = SimpleNamespace(
        compute_capability=capability, device_kind="a GPU", core_count=100
    )
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: backend)


@pytest.mark.parametrize(
    ("capability", "width", "chosen"),
    [("8.0", 64, True), ("8.9", 128, True), ("8.6", 96, False), ("9.0", 32, True)],
)
def test_gpus_take_it_unasked_for_the_widths_it_has(
    monkeypatch, on_cpu, capability, width, chosen
):
    pretend(monkeypatch, "gpu", capability)
    q, k = jnp.zeros((8, 1, width), jnp.bfloat16), jnp.zeros((8, width), jnp.bfloat16)
    attend = functools.partial(segment_attention, causal=True)
    names = ops_oracle.primitives(attend, q, k, k, jnp.asarray([0, 8]))
    assert ("pure_callback" in names) == chosen


@pytest.mark.parametrize(
    ("dtype", "width", "scale", "reason"),
    [
        ("float32", 64, 1.0, "bfloat16 or float16, not float32"),
        ("bfloat16", 96, 1.0, "heads of 96; it takes 16, 32, 64, 128 or 256"),
        ("float16", 64, -1.0, "scale is -1.0; it takes a number above 0"),
    ],
)
def test_calls_it_cannot_serve_say_why(on_cpu, dtype, width, scale, reason):
    q, k = jnp.zeros((8, 1, width), dtype), jnp.zeros((8, width), dtype)
    call = functools.partial(segment_attention, q, k, k, jnp.asarray([0, 8]))
    with pytest.raises(ConfigError, match=reason) as error:
        call(causal=True, scale=scale, implementation="triton")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("backend", "capability", "reason"),
    [
        ("cpu", None, "it needs an NVIDIA GPU, not cpu"),
        ("gpu", "7.5", "compute capability 7.5; it needs 8.0 .Ampere. or later"),
    ],
)
def test_devices_that_cannot_run_it_are_named(monkeypatch, backend, capability, reason):
    pretend(monkeypatch, backend, capability)
    q, k = jnp.zeros((8, 1, 64), jnp.bfloat16), jnp.zeros((8, 64), jnp.bfloat16)
    offsets = jnp.asarray([0, 8])
    with pytest.raises(ConfigError, match=reason):
        segment_attention(q, k, k, offsets, causal=True, implementation="triton")
