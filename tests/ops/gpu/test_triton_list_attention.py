"""Lists of keys on the GPU kernels, in their interpreters: rows that see nothing."""

from __future__ import annotations

from tests.ops.gpu import test_triton_segment_attention as on_triton

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.ops import ops_oracle
from uoe_jax.ops import nvidia
from uoe_jax.ops.as_segments import Lists, list_attention
from uoe_jax.ops.segment_attention.nvidia import mosaic as mosaic_gpu
from uoe_jax.ops.segment_attention.nvidia import triton

SIMULATED = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")


def value_and_gradients(call, grad, implementation):
    q, k, v, *rest = call

    def attend(q, k, v):
        lists = Lists(q, k, v, *rest, max_rows=q.shape[0])
        return list_attention(lists, implementation=implementation)

    out, vjp = jax.vjp(attend, q, k, v)
    return out, *vjp(grad)


def draw_call(seed, rows, keys, groups, width, dtype):
    """Three segments, the middle one empty, and two rows past the last."""
    draw = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(draw.normal(size=shape), dtype)
    q, k, v = (
        normal(rows, groups, width),
        normal(3, keys, width),
        normal(3, keys, width),
    )
    cut = int(draw.integers(1, rows - 2))
    offsets = jnp.array([0, cut, cut, rows - 2], jnp.int32)
    place = np.sort(draw.integers(0, keys, rows))  # as tokens of a causal model
    first = np.where(draw.random(rows) < 0.3, place // 2, 0)
    last = np.where(draw.random(rows) < 0.1, -1, place)  # some see nothing
    first, last = (jnp.asarray(x, jnp.int32) for x in (first, last))
    return (q, k, v, offsets, first, last), normal(rows, groups, width)


def check(call, grad, got, steps):
    wide = lambda a: a.astype(jnp.float32) if a.dtype.itemsize == 2 else a
    call = tuple(wide(a) for a in call)
    want = jax.jit(value_and_gradients, static_argnums=2)(call, wide(grad), "xla")
    ops_oracle.assert_near(got, want, steps * float(jnp.finfo(grad.dtype).eps))


def test_on_hopper_kernels(capfd):
    call, grad = draw_call(0, 50, 30, 1, 64, jnp.bfloat16)
    with mosaic_gpu.interpreted(SIMULATED):
        got = jax.jit(value_and_gradients, static_argnums=2)(call, grad, "mosaic_gpu")
        got = jax.block_until_ready(got)
    check(call, grad, got, 1.5)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.float16
def test_on_triton_kernels(monkeypatch):
    tiles = lambda kernel, shape: on_triton.TILES[kernel]
    monkeypatch.setattr(triton, "choose_tiles", tiles)
    call, grad = draw_call(7, 14, 8, 1, 16, jnp.float16)
    with nvidia.interpreted(on_triton.run):
        got = jax.jit(value_and_gradients, static_argnums=2)(call, grad, "triton")
        got = jax.block_until_ready(got)
    check(call, grad, got, 1.5)
