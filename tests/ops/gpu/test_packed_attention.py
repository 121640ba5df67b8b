"""Dense attention by the segment kernels: packing, documents, and who gets it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import ops_oracle
from uoe_jax.ops import dense_attention
from uoe_jax.ops.as_segments import packed_attention
from uoe_jax.ops.dense_attention import reference
from uoe_jax.ops.dense_attention.call import Call
from uoe_jax.ops.segment_attention import xla
from uoe_jax.ops.segment_attention.call import Mask
from uoe_jax.ops.segment_attention.nvidia import mosaic as mosaic_gpu

BATCH, LENGTH, WIDTH = 2, 40, 8


@pytest.mark.parametrize(
    ("causal", "window", "documents"),
    [(True, None, True), (False, 9, True), (True, 9, False), (False, None, False)],
)
def test_packed_heads_are_dense_attention(causal, window, documents):
    rng = np.random.default_rng()
    shapes = [(BATCH, LENGTH, heads, WIDTH) for heads in (4, 2, 2, 4)]
    q, k, v, grad = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    # An id that comes back is another document.
    ids = np.repeat([3, 1, 3, 0], [5, 20, 10, 5])
    segments = jnp.asarray(np.stack([ids, np.roll(ids, 7)])) if documents else None
    options = Mask(causal, window), segments, 0.3

    @functools.partial(jax.jit, static_argnums=0)
    def both(attend, q, k, v, grad):
        out, vjp = jax.vjp(lambda *x: attend(Call(*x, *options)), q, k, v)
        return out, *vjp(grad)

    packed = functools.partial(packed_attention, xla.segment_attention)
    got = both(packed, q, k, v, grad)
    want = both(reference.dense_attention, q, k, v, grad)
    # Sums of up to 40 numbers near 1, in float32.
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_documents_get_the_kernels_on_hopper(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "_cores", lambda: 132)
    x = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def loss(q, k, v, segments):
        out = dense_attention(q, k, v, causal=True, segments=segments)
        return jnp.sum(out.astype(jnp.float32))

    # That they lower for the device is of test_mosaic_gpu_segment_attention.py.
    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, x, x, ids).jaxpr
    names = [eqn.primitive.name for eqn in ops_oracle.equations(jaxpr)]
    # Forward, and the gradients of queries and of keys; wgmma: Hopper's products.
    assert names.count("mpmd_map") == 3 and "wgmma_ref" in names
