"""Eight devices, batch sharded and parameters replicated, compute what one does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tests.model.tiny_models import VARIANTS, build, tokens_like
from uoe_jax.model import router_losses


def test_eight_devices_equal_one():
    config = VARIANTS["mixed"]
    patched = dataclasses.replace(config.union, patch_size=2)
    parts = {"attention": ("union",), "mlp": ("moe",), "union": patched}
    config = dataclasses.replace(config, num_layers=1, **parts)
    model = build(config)
    tokens = tokens_like(config, 8, 6, seed=1)
    # Uneven padding: a mean of the devices' means would be another number.
    length = 1 + jnp.arange(8)[:, None] % 6
    segments = (jnp.arange(6)[None] < length).astype(jnp.int32)
    graphdef, params, buffers = nnx.split(model, nnx.Param, ...)

    def loss(params, tokens, segments, axis_name):
        model = nnx.merge(graphdef, params, buffers)
        logits, aux = model(tokens, segments=segments, axis_name=axis_name)
        real = segments != 0
        total = jnp.sum(jnp.where(real, jax.nn.logsumexp(logits, -1), 0))
        count = jnp.sum(real)
        if axis_name is not None:
            total, count = jax.lax.psum((total, count), axis_name)
        return total / count + router_losses(aux, config), (logits, aux)

    step = jax.value_and_grad(loss, has_aux=True)
    one = jax.jit(lambda p, t, s: step(p, t, s, None))(params, tokens, segments)

    mesh = jax.make_mesh((8,), ("data",))
    whole, split = PartitionSpec(), PartitionSpec("data")
    place = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    sharded = jax.shard_map(
        lambda p, t, s: step(p, t, s, "data"),
        mesh=mesh,
        in_specs=(whole, split, split),
        out_specs=((whole, (split, whole)), whole),
        check_vma=True,
    )
    arguments = (place(params, whole), place(tokens, split), place(segments, split))
    many = jax.jit(sharded)(*arguments)
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5)
