"""Adapters with every factor non-zero."""

import jax


def randomise(adapters, seed=0, size=0.3):
    """No factor zero, so that every part of a delta counts."""
    leaves, tree = jax.tree.flatten(adapters.weights)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    noisy = [a + size * jax.random.normal(k, a.shape, a.dtype) for a, k in pairs]
    return adapters.with_weights(jax.tree.unflatten(tree, noisy))
