from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from uoe_jax import ops

pytestmark = pytest.mark.both_jax

# Long enough for the blockwise paths.
BATCH, LENGTH, EXPERTS, TOP_K, LAYERS = 8, 72, 4, 2, 2
MODEL, WIDTH = 16, 8
SHARDED = PartitionSpec("data")


def layer(x, weights, choices, implementation):
    """A routed attention layer, then a dense one over document ids."""
    packing = ops.pack_choices(choices, EXPERTS)
    flat = x.reshape(-1, MODEL)
    project = functools.partial(
        ops.gather_project, packing=packing, implementation=implementation
    )
    q = project(flat, weights["q"]).reshape(-1, 2, WIDTH)
    k = project(flat, weights["k"])
    v = ops.grouped_matmul(
        ops.gather_rows(flat, packing),
        weights["v"],
        packing.group_offsets,
        implementation=implementation,
    )
    out = ops.segment_attention(
        q, k, v, packing.segment_offsets, causal=True, implementation=implementation
    )
    out = ops.project_scatter(
        out.reshape(-1, 2 * WIDTH), weights["o"], packing, implementation=implementation
    )
    x = x + out.reshape(x.shape)
    heads = x.reshape(*x.shape[:2], 2, MODEL // 2)
    mixed = ops.dense_attention(
        heads,
        heads,
        heads,
        causal=False,
        segments=choices[:, :, 0],
        implementation=implementation,
    )
    return x + mixed.reshape(x.shape)


def loss(weights, x, choices, implementation=None):
    @jax.checkpoint
    def body(x, weights):
        return layer(x, weights, choices, implementation), None

    return jnp.square(jax.lax.scan(body, x, weights)[0]).mean()


def test_sharded_rows_and_replicated_weights_equal_one_device(rng):
    """Under shard_map with checked types, scan over layers and checkpoint."""

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) / shape[-2] ** 0.5, jnp.float32)

    weights = {
        "q": draw(LAYERS, EXPERTS, MODEL, 2 * WIDTH),
        "k": draw(LAYERS, EXPERTS, MODEL, WIDTH),
        "v": draw(LAYERS, EXPERTS, MODEL, WIDTH),
        "o": draw(LAYERS, EXPERTS, 2 * WIDTH, MODEL),
    }
    x = draw(BATCH, LENGTH, MODEL)
    score = rng.random((BATCH, LENGTH, EXPERTS))
    choices = jnp.asarray(np.argsort(score, axis=-1)[..., :TOP_K], jnp.int32)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), SHARDED, SHARDED),
        out_specs=(PartitionSpec(), (PartitionSpec(), SHARDED)),
    )
    def sharded(weights, x, choices):
        def mean_loss(weights, x):
            return jax.lax.pmean(loss(weights, x, choices), "data")

        return jax.value_and_grad(mean_loss, (0, 1))(weights, x)

    put = functools.partial(jax.device_put, device=NamedSharding(mesh, SHARDED))
    got = sharded(weights, put(x), put(choices))
    one = functools.partial(loss, choices=choices, implementation="reference")
    want = jax.jit(jax.value_and_grad(one, (0, 1)))(weights, x)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # Float32, two layers, sums in another order.
        bound = 2e-5 * float(jnp.abs(w).max())
        np.testing.assert_allclose(np.asarray(g), np.asarray(w), rtol=0, atol=bound)
