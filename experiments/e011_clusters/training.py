"""MLC on pictures: a start for spread-out features, and then R - Rc."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.e011_clusters.network import ResNet
from experiments.e011_clusters.pictures import Pictures
from uoe_jax.cluster.objective import start_value, value
from uoe_jax.files import write_atomically

TIMED = 20  # steps that tell how long the others take


class Scale(NamedTuple):
    """How much of everything."""

    width: int = 128  # of the features
    widths: tuple[int, ...] = (64, 128, 256, 512)
    start_steps: int = 4000
    start_batch: int = 512
    start_rate: float = 1e-3
    invariance: float = 200.0
    steps: int = 160
    batch: int = 1024
    rate: float = 1e-4
    eps2: float = 0.1
    eta: float = 0.175


DIGITS = Scale(
    width=32, widths=(16, 32, 64), start_steps=300, start_batch=256, steps=60, batch=256
)


class Trained:
    """MLC's network on pictures: its start, and then R - Rc."""

    def __init__(self, pictures: Pictures, scale: Scale, seed: int):
        self.pictures, self.scale, self.seed = pictures, scale, seed
        net = nnx.eval_shape(lambda: ResNet(scale.width, nnx.Rngs(seed), scale.widths))
        self.graph, shapes = nnx.split(net)
        self.state = drawn(shapes, seed)
        self._run = jax.jit(lambda state, x: nnx.merge(self.graph, state)(x))

    def start(self, seconds: float, steps: int | None = None) -> int:
        """Train for features that are spread out and the same for two views.

        In the given time at most, compiling left out, or for so many steps; return the
        steps taken.
        """
        s = self.scale

        def loss(state: Any, views: Any) -> Any:
            (z, z2), _ = self._both(state, views)
            return -start_value((z, z2), s.eps2, s.invariance)

        amount = steps or s.start_steps, s.start_batch, seconds
        taken = sum(1 for _ in self._descend(loss, optax.adamw(s.start_rate), amount))
        net = nnx.merge(self.graph, self.state)
        nnx.update(net.clusters, nnx.state(net.features))  # the one-shot start
        self.graph, self.state = nnx.split(net)
        return taken

    def go_on(
        self, seconds: float, steps: int | None = None
    ) -> tuple[int, list[float]]:
        """Train for R - Rc and keep what is best on held-out pictures.

        Return the steps taken, and the values on those pictures.
        """
        s = self.scale

        def loss(state: Any, views: Any) -> Any:
            knobs = {"eps2": s.eps2, "eta": s.eta, "absolute": False, "gamma": 0.0}
            return -value(*self._both(state, views), **knobs)

        held = jnp.asarray(self.pictures.held[: s.batch])
        views = self._views(held, jax.random.key(99))
        measure, found = jax.jit(lambda state: -loss(state, views)), []
        best, kept, number = -np.inf, self.state, -1
        every = max(s.steps // 20, 1)
        amount = steps or s.steps, s.batch, seconds
        for number in self._descend(loss, optax.adam(s.rate), amount, falls=False):
            if number % every == 0:
                found.append(float(measure(self.state)))
                if found[-1] > best:
                    best, kept = found[-1], self.state
        self.state = kept
        return number + 1, found

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Return Z and C of all pictures, unchanged."""
        x = self.pictures.images
        parts = [self._run(self.state, x[i : i + 1000]) for i in range(0, len(x), 1000)]
        return tuple(np.concatenate([np.asarray(p[n]) for p in parts]) for n in (0, 1))  # type: ignore[return-value]

    def _views(self, images: Any, key: Any) -> Any:
        """Return two views of each picture, the first of all and then the second."""
        return self.pictures.views(jnp.concatenate([images, images]), key)

    def _both(self, state: Any, views: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """Return both views' Z, and their C; the network runs once for both."""
        found = nnx.merge(self.graph, state)(views)
        return tuple(tuple(jnp.split(rows, 2)) for rows in found)  # type: ignore[return-value]

    def save(self, path: Path) -> None:
        """Write the weights."""
        arrays = [np.asarray(a) for a in jax.tree.leaves(self.state)]
        write_atomically(path, npz_bytes(arrays))

    def load(self, path: Path) -> None:
        """Read weights that were written."""
        with np.load(path) as found:
            arrays = [jnp.asarray(found[name]) for name in found.files]
        self.state = jax.tree.unflatten(jax.tree.structure(self.state), arrays)

    def _descend(
        self,
        loss: Any,
        optimizer: Any,
        amount: tuple[int, int, float],
        *,
        falls: bool = True,
    ) -> Iterator[int]:
        """Take steps on random views of random batches; yield each one's number.

        `amount` are steps, pictures of a step, and seconds: if the first steps tell
        that time won't do, fewer are taken. The rate falls to zero along a cosine.
        """

        @jax.jit
        def step(state: Any, memory: Any, images: Any, key: Any, share: Any) -> Any:
            views = self._views(images, key)
            slope = jax.grad(loss)(state, views)
            change, memory = optimizer.update(slope, memory, state)
            change = jax.tree.map(lambda a: share * a, change)
            return optax.apply_updates(state, change), memory

        steps, size, seconds = amount
        draw, memory = np.random.default_rng(self.seed), optimizer.init(self.state)
        key, images = jax.random.key(self.seed), jnp.asarray(self.pictures.images)
        size, number, begun = min(size, len(images)), 0, 0.0
        while number < steps:
            batch = jnp.asarray(draw.choice(len(images), size, replace=False))
            share = 0.5 + 0.5 * np.cos(np.pi * number / steps) if falls else 1.0
            fold = jax.random.fold_in(key, number)
            self.state, memory = step(self.state, memory, images[batch], fold, share)
            yield number
            number += 1
            if number in (1, TIMED):
                jax.block_until_ready(self.state)
                now = time.perf_counter()
                if number == 1:
                    begun = now
                else:
                    each = (now - begun) / (TIMED - 1)
                    if seconds < steps * each:
                        steps = max(int(seconds / each), TIMED)
                    print(f"{1000 * each:.0f} ms a step, {steps} steps", flush=True)


def drawn(shapes: Any, seed: int) -> Any:
    """Return a network's first weights: He's for kernels, ones for scales, else zeros.

    By numpy: programs that draw them would be compiled for each shape.
    """
    draw = np.random.default_rng(seed)

    def leaf(path: Any, like: Any) -> Any:
        name = jax.tree_util.keystr(path)
        if "kernel" in name:
            deviation = np.sqrt(2 / np.prod(like.shape[:-1]))
            return jnp.asarray(draw.normal(0, deviation, like.shape), like.dtype)
        return jnp.full(like.shape, 1.0 if "scale" in name else 0.0, like.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def npz_bytes(arrays: list[np.ndarray]) -> bytes:
    """Return arrays as the content of a .npz file."""
    file = io.BytesIO()
    np.savez(file, *arrays)
    return file.getvalue()
