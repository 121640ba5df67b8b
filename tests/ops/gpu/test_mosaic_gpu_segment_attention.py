"""The GPU kernels without a GPU: their interpreter, and lowering for the real thing."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.ops import ops_oracle
from uoe_jax.errors import ConfigError
from uoe_jax.ops import dense_attention, segment_attention
from uoe_jax.ops.segment_attention.call import Call, Mask
from uoe_jax.ops.segment_attention.nvidia import mosaic as mosaic_gpu
from uoe_jax.ops.segment_attention.nvidia import mosaic_forward as mosaic_gpu_forward
from uoe_jax.ops.segment_attention.nvidia import (
    mosaic_key_gradients as mosaic_gpu_key_gradients,
)
from uoe_jax.ops.segment_attention.nvidia import mosaic_parts as parts
from uoe_jax.ops.segment_attention.nvidia import (
    mosaic_query_gradient as mosaic_gpu_query_gradient,
)

SIMULATED = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")


@functools.partial(
    jax.jit, static_argnames=("causal", "window", "with_bounds", "deterministic")
)
def value_and_grads(
    q, k, v, grad, offsets, bounds, causal, window, with_bounds, deterministic
):
    def attend(q, k, v):
        seen = bounds if with_bounds else None
        call = Call(q, k, v, offsets, Mask(causal, window), 0.2, seen)
        return mosaic_gpu.segment_attention(call, deterministic=deterministic)

    out, vjp = jax.vjp(attend, q, k, v)
    return out, *vjp(grad)


@pytest.mark.both_jax
@pytest.mark.parametrize(
    ("dtype", "groups", "width", "causal", "deterministic"),
    [
        pytest.param(jnp.bfloat16, 1, 128, True, False, marks=pytest.mark.nightly),
        (jnp.float16, 2, 64, False, True),  # all three kernels
    ],
)
def test_kernels_lower_for_a_gpu(
    monkeypatch, dtype, groups, width, causal, deterministic
):
    """Register layouts and shared memory are decided here, not on the device."""
    monkeypatch.setattr(mosaic_gpu, "_cores", lambda: 132)
    rows = 1024

    def struct(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    q, k = struct(rows, groups, width), struct(rows, width)
    bounds = (struct(rows, dtype=jnp.int32),) * 2
    offsets = struct(5, dtype=jnp.int32)
    flags = (causal, None, not causal, deterministic)
    traced = value_and_grads.trace(q, k, k, q, offsets, bounds, *flags)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == (3 if deterministic else 2)


@pytest.mark.parametrize(
    ("dtype", "width", "scale", "reason"),
    [
        (jnp.float32, 64, 1.0, "not float32"),
        (jnp.bfloat16, 96, 1.0, "heads of 96; it takes 64 or 128"),
        (jnp.bfloat16, 64, -1.0, "a number above 0"),
    ],
)
def test_calls_it_cannot_serve_say_why(monkeypatch, dtype, width, scale, reason):
    monkeypatch.setattr(mosaic_gpu, "_cores", lambda: 132)
    q, k = jnp.zeros((8, 1, width), dtype), jnp.zeros((8, width), dtype)
    with pytest.raises(ConfigError, match=reason):
        segment_attention(
            q,
            k,
            k,
            jnp.asarray([0, 8]),
            causal=True,
            scale=scale,
            implementation="mosaic_gpu",
        )


def test_other_devices_are_served_by_another_backend():
    q, k = jnp.ones((8, 1, 64), jnp.bfloat16), jnp.ones((8, 64), jnp.bfloat16)
    offsets = jnp.asarray([0, 8])
    with pytest.raises(ConfigError, match="needs a Hopper GPU, not cpu"):
        segment_attention(q, k, k, offsets, causal=True, implementation="mosaic_gpu")
    np.testing.assert_array_equal(segment_attention(q, k, k, offsets, causal=True), q)


def test_documents_get_the_kernels_on_hopper(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "_cores", lambda: 132)
    x = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def loss(q, k, v, segments):
        out = dense_attention(q, k, v, causal=True, segments=segments)
        return jnp.sum(out.astype(jnp.float32))

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, x, x, ids).jaxpr
    names = [eqn.primitive.name for eqn in ops_oracle.equations(jaxpr)]
    # Forward, and the gradients of queries and of keys; wgmma: Hopper's products.
    assert names.count("mpmd_map") == 3 and "wgmma_ref" in names


def test_layers_of_one_shape_share_their_kernels():
    """Each kernel takes seconds to lower, which 24 layers must not do 24 times."""
    q, k = jnp.ones((64, 1, 64), jnp.bfloat16), jnp.ones((64, 64), jnp.bfloat16)
    offsets = jnp.asarray([0, 40, 64])

    def layers(q):
        for _ in range(3):
            call = Call(q, k, k, offsets, Mask(causal=True), 1.0)
            q = mosaic_gpu.segment_attention(call)
        return jnp.sum(q.astype(jnp.float32))

    with mosaic_gpu.interpreted(SIMULATED):
        traced = jax.make_jaxpr(jax.grad(layers))(q)
    called = [
        (eqn.params["name"], id(eqn.params["jaxpr"]))
        for eqn in traced.jaxpr.eqns
        if "jaxpr" in eqn.params and "name" in eqn.params
    ]
    for name in ("_attention_fwd", "_attention_bwd"):
        found = [place for other, place in called if other == name]
        assert len(found) == 3 and len(set(found)) == 1


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_multiprocessor_holds_what_a_program_takes(width, deterministic):
    """64K registers and 227 KiB of shared memory, 1 KiB of it for barriers."""
    options = {"mask": Mask(causal=True), "scale": 1.0}
    made = mosaic_gpu.make_settings(width, 132, deterministic=deterministic, **options)
    memory = {
        "forward": mosaic_gpu_forward._scratch(made.forward, width, jnp.bfloat16),
        "query": mosaic_gpu_query_gradient._scratch(made.query, width, jnp.bfloat16),
        "key": mosaic_gpu_key_gradients._scratch(
            made.key, width, jnp.bfloat16, not deterministic
        ),
    }
    for kernel, scratch in memory.items():
        assert sum(map(held, jax.tree.leaves(scratch))) <= 226 << 10, kernel
        taken = getattr(made, kernel)
        registers = taken.consumers * taken.registers + parts.PRODUCER_REGISTERS
        assert 128 * registers <= 1 << 16, kernel


def held(item):
    """Bytes of a scratch allocation: of views of one memory, those of the largest."""
    if isinstance(item, plgpu.RefUnion):
        return max(map(held, item.refs))
    if isinstance(item, plgpu.Barrier):
        return 0
    return math.prod(item.shape) * jnp.dtype(item.dtype).itemsize
