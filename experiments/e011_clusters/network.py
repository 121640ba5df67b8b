"""A ResNet-18 for small pictures with MLC's two heads, and random views."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from uoe_jax.cluster.network import unit_rows

WIDTHS = (64, 128, 256, 512)


class Block(nnx.Module):
    """Two convolutions with group norms, and the way round them."""

    def __init__(self, inside: int, outside: int, stride: int, rngs: nnx.Rngs):
        conv = lambda i, s, k: nnx.Conv(
            i, outside, (k, k), strides=s, use_bias=False, rngs=rngs
        )
        norm = lambda: nnx.GroupNorm(outside, num_groups=min(32, outside), rngs=rngs)
        self.first, self.second = conv(inside, stride, 3), conv(outside, 1, 3)
        self.norms = nnx.List([norm(), norm()])
        changes = stride != 1 or inside != outside
        self.way = conv(inside, stride, 1) if changes else None

    def __call__(self, x: Array) -> Array:
        """Return the block's output."""
        inner = nnx.relu(self.norms[0](self.first(x)))
        inner = self.norms[1](self.second(inner))
        return nnx.relu(inner + (x if self.way is None else self.way(x)))


class ResNet(nnx.Module):
    """Pictures to rows of length 1: features Z, and C whose products are affinities."""

    def __init__(self, width: int, rngs: nnx.Rngs, widths: tuple[int, ...] = WIDTHS):
        self.stem = nnx.Conv(3, widths[0], (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.GroupNorm(widths[0], num_groups=min(32, widths[0]), rngs=rngs)
        blocks, inside = [], widths[0]
        for number, outside in enumerate(widths):
            for stride in (1 if number == 0 else 2, 1):
                blocks.append(Block(inside, outside, stride, rngs))
                inside = outside
        self.blocks = nnx.List(blocks)
        self.hidden = nnx.Linear(inside, inside, rngs=rngs)
        self.features = nnx.Linear(inside, width, rngs=rngs)
        self.clusters = nnx.Linear(inside, width, rngs=rngs)

    def __call__(
        self, images: Float[Array, "N S S 3"]
    ) -> tuple[Float[Array, "N D"], Float[Array, "N D"]]:
        """Return Z and C."""
        x = nnx.relu(self.norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        x = nnx.relu(self.hidden(x.mean(axis=(1, 2))))
        return unit_rows(self.features(x)), unit_rows(self.clusters(x))


def random_views(images: Float[Array, "N S S 3"], key: Array) -> Array:
    """Return a view of each picture: cropped, mirrored, its colours changed."""
    return jax.vmap(_view)(images, jax.random.split(key, len(images)))


def _view(image: Array, key: Array) -> Array:
    keys = jax.random.split(key, 7)
    size = image.shape[0]
    scale = jnp.sqrt(1 / jax.random.uniform(keys[0], minval=0.25, maxval=1.0))
    shift = -jax.random.uniform(keys[1], (2,)) * (scale - 1) * size
    image = jax.image.scale_and_translate(
        image, image.shape, (0, 1), jnp.stack([scale, scale]), shift, "linear"
    )
    image = jnp.where(jax.random.bernoulli(keys[2]), image[:, ::-1], image)
    bright, contrast, colour = jax.random.uniform(keys[3], (3,), minval=0.6, maxval=1.4)
    grey = image.mean(axis=-1, keepdims=True)
    coloured = grey + colour * (image - grey)
    middle = coloured.mean()
    changed = bright * (middle + contrast * (coloured - middle))
    image = jnp.where(jax.random.bernoulli(keys[4], 0.8), changed, image)
    grey = jnp.broadcast_to(image.mean(axis=-1, keepdims=True), image.shape)
    return jnp.where(jax.random.bernoulli(keys[5], 0.2), grey, image)
