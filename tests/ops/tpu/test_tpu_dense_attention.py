"""Which kernels a TPU is given."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import pytest

from tests.ops.tpu import tpu_oracle
from uoe_jax.ops import (
    dense_attention,
    gather_project,
    grouped_matmul,
    pack_choices,
    project_scatter,
    segment_attention,
    tpu,
)


def kernels_of(function, *args):
    with tpu.compiling_for("TPU v5p"):
        return tpu_oracle.kernels(function, *args)


@pytest.mark.both_jax
def test_a_tpu_is_given_its_kernels():
    bf16 = jnp.bfloat16
    x = jnp.zeros((2, 256, 2, 128), bf16)
    dense = functools.partial(dense_attention, causal=True)
    assert kernels_of(dense, x, x, x) == {"splash_mha_fwd_residuals"}
    for odd in (x[:, :200], x[..., :32]):  # what splash doesn't take
        assert kernels_of(dense, odd, odd, odd) == {"segment_attention_forward"}
    rows, offsets = x.reshape(-1, 128), jnp.asarray([0, 300, 1024])
    attend = functools.partial(segment_attention, causal=True)
    names = kernels_of(attend, rows[:, None], rows, rows, offsets)
    assert names == {"segment_attention_forward"}
    w = jnp.zeros((2, 128, 128), bf16)
    assert kernels_of(grouped_matmul, rows, w, offsets) == {"grouped_matmul"}
    packing = pack_choices(jnp.zeros((2, 256, 1), jnp.int32), 2)
    tokens = rows[:512]
    assert kernels_of(gather_project, tokens, w, packing) == {"grouped_matmul"}
    names = kernels_of(project_scatter, tokens, w, packing)
    assert names == {"grouped_matmul", "sum_rows"}
    # Rows that aren't whole registers are gathered and summed by XLA.
    names = kernels_of(project_scatter, tokens, w[..., :96], packing)
    assert names == {"grouped_matmul"}


@pytest.mark.both_jax
def test_a_cpu_is_not():
    x = jnp.zeros((1, 128, 1, 64))
    dense = functools.partial(dense_attention, causal=True)
    assert not tpu_oracle.kernels(dense, x, x, x)
