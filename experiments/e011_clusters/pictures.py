"""The pictures that are clustered: a subset of CIFAR-10, or digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

from experiments.e011_clusters.network import random_views


class Pictures(NamedTuple):
    """Pictures [N, S, S, 3] around 0, their classes, and some that are held out."""

    images: np.ndarray
    classes: np.ndarray
    held: np.ndarray
    views: Callable[[Any, Any], Any]


def read_cifar(path: Path) -> Pictures:
    """Return the subset: stored as differences along rows, columns and colours."""
    found = np.load(path)

    def images(stored: np.ndarray) -> np.ndarray:
        x = np.cumsum(np.cumsum(stored, 2, dtype=np.uint8), 3, dtype=np.uint8)
        x = np.stack([x[:, 0] + x[:, 1], x[:, 0], x[:, 0] + x[:, 2]], -1)
        return (x / 255.0 - 0.45).astype(np.float32) * 4

    classes = found["ytr"].astype(np.int64).ravel()
    return Pictures(images(found["xtr"]), classes, images(found["xte"]), random_views)


def read_digits() -> Pictures:
    """Return scikit-learn's digits; a view is shifted by a pixel, with some noise."""
    digits = load_digits()
    images = np.repeat(digits.images[..., None] / 8.0 - 1, 3, -1).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    held, rest = order[:256], np.sort(order[256:])

    def shifted(image: Any, key: Any) -> Any:
        place, noise = jax.random.split(key)
        moved = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=-1)
        at = jax.random.randint(place, (2,), 0, 3)
        cut = jax.lax.dynamic_slice(moved, (at[0], at[1], 0), image.shape)
        return cut + 0.2 * jax.random.normal(noise, image.shape)

    def views(images: Any, key: Any) -> Any:
        return jax.vmap(shifted)(images, jax.random.split(key, len(images)))

    return Pictures(images[rest], digits.target[rest], images[held], views)
