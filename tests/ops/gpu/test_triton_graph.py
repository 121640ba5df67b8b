"""Calls of small kernels become typed ones, which CUDA graphs take."""

import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir

from uoe_jax.ops import nvidia

KERNEL = b"x\x9c\x00kernel"


@pytest.fixture
def bridge(monkeypatch):
    """What jax-triton 0.3 has: a primitive that makes calls of the old kind."""
    call = Primitive("stand_in_for_a_triton_kernel")
    call.multiple_results = True
    call.def_abstract_eval(lambda *arrays, **params: list(arrays))

    def lower(backend, ctx, *args, custom_call_target_name, input_output_aliases):
        rule = jax.ffi.ffi_lowering(
            custom_call_target_name,
            api_version=2,
            backend_config=KERNEL,
            operand_output_aliases=dict(input_output_aliases),
        )
        return rule(ctx, *args)

    library = types.ModuleType("jax_triton.triton_lib")
    library.triton_kernel_call_p = call
    library.triton_kernel_call_lowering = lower
    library.get_cuda_backend = None
    mlir.register_lowering(
        call, lambda ctx, *args, **params: lower(None, ctx, *args, **params), "cuda"
    )
    monkeypatch.setitem(sys.modules, "jax_triton.triton_lib", library)
    nvidia.typed_calls.cache_clear()
    yield library
    nvidia.typed_calls.cache_clear()


def lowered(call, target):
    run = lambda x, y: call.bind(
        x, y, custom_call_target_name=target, input_output_aliases=((0, 1),)
    )
    traced = jax.jit(run).trace(jnp.zeros(4), jnp.zeros(4))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_a_small_kernels_call_is_typed_and_carries_the_same_kernel(bridge):
    assert nvidia.typed_calls()
    text = lowered(bridge.triton_kernel_call_p, nvidia.IN_GRAPH)
    assert text.count("stablehlo.custom_call") == 1  # that of the old kind is gone
    assert f"custom_call @{nvidia.IN_GRAPH}" in text
    assert 'mhlo.backend_config = {opaque = "x\\9C\\00kernel"}' in text
    assert "output_tuple_indices = [1], operand_index = 0" in text


def test_other_calls_stay_as_they_are(bridge):
    assert nvidia.typed_calls()
    text = lowered(bridge.triton_kernel_call_p, "triton_kernel_call")
    assert "custom_call @triton_kernel_call(" in text and "opaque" not in text


def test_later_releases_make_typed_calls_themselves(bridge):
    bridge.CUSTOM_CALL_TARGET_NAME = nvidia.IN_GRAPH
    assert not nvidia.typed_calls()
