"""jax's splash kernel behind `dense_attention`, and which kernels a TPU is given."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
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
from uoe_jax.ops.dense_attention import reference, splash
from uoe_jax.ops.dense_attention.call import Call
from uoe_jax.ops.segment_attention.call import Mask

LENGTH, WIDTH = 256, 64
CASES = {
    "causal, grouped": dict(causal=True, window=None, heads=2, documents=False),
    "full window": dict(causal=False, window=70, heads=1, documents=False),
    # An id that comes back is another document.
    "causal documents": dict(causal=True, window=None, heads=1, documents=True),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.both_jax if options["heads"] == 1 else ())
        for case, options in CASES.items()
    ],
)
def test_value_and_gradients_match_float64(case):
    options = dict(CASES[case])
    heads = options.pop("heads")
    segments = None
    if options.pop("documents"):
        segments = jnp.asarray(np.repeat([1, 2, 1], [100, 100, 56])[None])
    rng = np.random.default_rng(0)
    sides = (heads, 1, 1, heads)
    q, k, v, grad = (
        jnp.asarray(rng.normal(size=(1, LENGTH, n, WIDTH)), jnp.float32) for n in sides
    )

    def differentiated(attend, q, k, v, grad, segments):
        more = Mask(**options), segments, 0.125
        out, vjp = jax.vjp(lambda *qkv: attend(Call(*qkv, *more)), q, k, v)
        return [out, *vjp(grad)]

    kernels = jax.jit(functools.partial(differentiated, splash.dense_attention))
    # Races aren't looked for: the kernel isn't ours, and its copies are the compiler's.
    got, _ = tpu_oracle.interpreted(
        kernels, q, k, v, grad, segments, detect_races=False, block=128
    )
    oracle = functools.partial(differentiated, reference.dense_attention)
    want = tpu_oracle.in_float64(oracle, q, k, v, grad, segments)
    tpu_oracle.assert_close(got, want, 5e-6)


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
