"""The Triton attention kernels without a GPU: their interpreter, and their dispatch."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from unittest import mock

from tests.ops.gpu import triton_on_cpu  # before anything that imports triton

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from triton.runtime import interpreter

from tests.ops import ops_oracle
from uoe_jax.errors import ConfigError
from uoe_jax.ops import nvidia, segment_attention
from uoe_jax.ops.segment_attention.call import Call, Mask
from uoe_jax.ops.segment_attention.nvidia import triton

ROWS, SEGMENTS, SCALE = 44, 3, 0.3
FLOAT16 = pytest.mark.float16

TILES = {
    "forward": triton.Tiles(32, 32, 4, 2),
    "query_gradient": triton.Tiles(32, 16, 4, 2),  # the forward schedule does
    "key_gradients": triton.Tiles(16, 32, 4, 2),
}
OTHERS = {
    "forward": triton.Tiles(32, 16, 4, 2),
    "query_gradient": triton.Tiles(16, 16, 4, 2),  # a schedule of its own
    "key_gradients": triton.Tiles(32, 16, 4, 2),
}
backwards = False  # whether programs take the tiles in the opposite order
cuts = st.lists(st.integers(0, ROWS), min_size=SEGMENTS, max_size=SEGMENTS).map(sorted)


def run(kernel, grid, constants, shapes, *arrays):
    """The arrays that a kernel writes, NaN where it writes nothing."""
    arrays = [np.asarray(a) for a in arrays]
    if backwards:
        place = kernel.arg_names.index("tiles")
        arrays[place] = arrays[place][::-1]
    with mock.patch.object(interpreter, "_patch_lang", patch_once()):
        return triton_on_cpu.run(kernel, grid, constants, shapes, *arrays)


def patch_once(patch=interpreter._patch_lang):
    """The interpreter's patch of the language, but once a kernel and module.

    It would be made anew, to the same effect, by every function that a kernel calls.
    """
    known = []

    def wrapped(fun):
        if any(fun.__globals__ is each for each in known):
            return interpreter._LangPatchScope()  # nothing to restore
        known.append(fun.__globals__)
        return patch(fun)

    return wrapped


@pytest.fixture
def on_cpu(monkeypatch):
    """The kernels on numpy arrays, in tiles that no segment fills."""
    monkeypatch.setattr(triton, "choose_tiles", lambda kernel, shape: TILES[kernel])
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


@pytest.mark.parametrize(
    ("dtype", "groups", "width", "causal", "window", "documents", "tiles"),
    [
        pytest.param("float16", 2, 16, True, None, False, TILES, marks=FLOAT16),
        ("bfloat16", 1, 32, False, None, False, OTHERS),
        pytest.param("float16", 1, 16, False, 9, False, OTHERS, marks=FLOAT16),
        pytest.param("float16", 1, 16, True, 20, True, TILES, marks=FLOAT16),
    ],
)
def test_value_and_gradients_match_float64(
    monkeypatch, on_cpu, dtype, groups, width, causal, window, documents, tiles
):
    monkeypatch.setattr(triton, "choose_tiles", lambda kernel, shape: tiles[kernel])

    @settings(deadline=None, max_examples=1)
    @given(cuts, st.integers(5, 30), st.integers(0, 2**32 - 1))
    @example([5, 5, 40], 17, 0)  # an empty segment, one across tiles, rows of none
    def check(cuts, document, seed):
        arrays = draw(np.random.default_rng(seed), groups, width, dtype)
        offsets, row = [0, *cuts], np.arange(ROWS)
        first = row // document * document
        bounds = (first, first + document - 1) if documents else None
        # Rows past the end must neither be seen nor reach others as 0 * nan.
        spoilt = [x.at[offsets[-1] :].set(jnp.nan) for x in arrays]
        seen = None if bounds is None else tuple(map(jnp.asarray, bounds))
        got = value_and_grads(*spoilt, jnp.asarray(offsets), seen, causal, window)
        visible = ops_oracle.segment_visible(offsets, ROWS, causal, window)
        if bounds is not None:
            visible &= (row >= bounds[0][:, None]) & (row <= bounds[1][:, None])
        want = ops_oracle.attention(*arrays, visible, SCALE)
        assert {x.dtype for x in got} == {jnp.dtype(dtype)}
        # Weights and results are rounded once each: two half-steps, and slack. The
        # interpreter cuts bfloat16 off where a GPU rounds: whole steps.
        steps = 3 if dtype == "bfloat16" else 1.5
        ops_oracle.assert_near(got, want, steps * float(jnp.finfo(dtype).eps))
        for x in got:
            assert not np.asarray(x[offsets[-1] :]).any()

    check()


@FLOAT16
def test_no_bit_depends_on_the_order_of_programs(on_cpu, monkeypatch):
    """No sum is shared by programs, so a GPU may run them in any order."""
    arrays = draw(np.random.default_rng(), 2, 16, "float16")
    args = *arrays, jnp.asarray([0, 5, 5, 40]), None, True, None
    got = jax.block_until_ready(value_and_grads(*args))
    monkeypatch.setitem(globals(), "backwards", True)
    for a, b in zip(got, value_and_grads(*args), strict=True):
        np.testing.assert_array_equal(a, b)


@FLOAT16
def test_vmap_inside_shard_map_matches_float64(on_cpu):
    rng, cuts = np.random.default_rng(), ([0, 9, 9, 30], [0, 40, 44, 44])
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
