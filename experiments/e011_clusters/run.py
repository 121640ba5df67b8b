"""Cluster pictures by MLC, with its network and by its affinity only, beside peers.

    python -m experiments.e011_clusters.run --cifar cifar10_jpg_8k2k.npz --out runs/e011
    python -m experiments.e011_clusters.run --out runs/e011-digits   # digits, on a CPU

A network is trained for features that are spread out and the same for two random views
(the start of MLC). k-means, a Gaussian mixture, spectral clustering and MLC's affinity
cluster these features. Then the network goes on for R - Rc; the best by that of a
held-out batch is kept. A seed's results are written when it is done.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture

from experiments.e011_clusters.network import ResNet, random_views
from uoe_jax.bench.record import made_with, write_record
from uoe_jax.cluster.metrics import (
    accuracy,
    adjusted_rand,
    mutual_information,
    numerical_rank,
)
from uoe_jax.cluster.objective import membership, start_value, value
from uoe_jax.cluster.ppp import PPP
from uoe_jax.cluster.spectral import spectral_labels
from uoe_jax.files import write_atomically
from uoe_jax.report.style import LIGHT, Theme, render

ANCHORS = 2048  # points whose labels are from the spectrum; others: nearest subspace


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


class Trained:
    """MLC's network on pictures: its start, and then R - Rc."""

    def __init__(self, pictures: Pictures, scale: Scale, seed: int):
        self.pictures, self.scale, self.seed = pictures, scale, seed
        net = ResNet(scale.width, nnx.Rngs(seed), scale.widths)
        self.graph, self.state = nnx.split(net)
        self._run = jax.jit(lambda state, x: nnx.merge(self.graph, state)(x))

    def start(self) -> None:
        """Train for features that are spread out and the same for two views."""
        s = self.scale

        def loss(state: Any, views: Any) -> Any:
            pair = [nnx.merge(self.graph, state)(view)[0] for view in views]
            return -start_value((pair[0], pair[1]), s.eps2, s.invariance)

        rate = optax.cosine_decay_schedule(s.start_rate, s.start_steps)
        for _ in self._descend(loss, optax.adamw(rate), s.start_steps, s.start_batch):
            pass
        net = nnx.merge(self.graph, self.state)
        nnx.update(net.clusters, nnx.state(net.features))  # the one-shot start
        self.graph, self.state = nnx.split(net)

    def go_on(self) -> list[float]:
        """Train for R - Rc and keep what is best on held-out pictures; return those."""
        s = self.scale

        def loss(state: Any, views: Any) -> Any:
            (z, c), (z2, c2) = (nnx.merge(self.graph, state)(view) for view in views)
            knobs = {"eps2": s.eps2, "eta": s.eta, "absolute": False, "gamma": 0.0}
            return -value((z, z2), (c, c2), **knobs)

        held = jnp.asarray(self.pictures.held[: s.batch])
        keys = jax.random.split(jax.random.key(99), 2)
        views = jnp.stack([self.pictures.views(held, key) for key in keys])
        measure, found = jax.jit(lambda state: -loss(state, views)), []
        best, kept = -np.inf, self.state
        every = max(s.steps // 20, 1)
        steps = self._descend(loss, optax.adam(s.rate), s.steps, s.batch)
        for number in steps:
            if number % every == 0:
                found.append(float(measure(self.state)))
                if found[-1] > best:
                    best, kept = found[-1], self.state
        self.state = kept
        return found

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Return Z and C of all pictures, unchanged."""
        x = self.pictures.images
        parts = [self._run(self.state, x[i : i + 1000]) for i in range(0, len(x), 1000)]
        return tuple(np.concatenate([np.asarray(p[n]) for p in parts]) for n in (0, 1))  # type: ignore[return-value]

    def _descend(
        self, loss: Any, optimizer: Any, steps: int, size: int
    ) -> Iterator[int]:
        """Take steps on random views of random batches; yield each one's number."""

        @jax.jit
        def step(state: Any, memory: Any, images: Any, key: Any) -> Any:
            keys = jax.random.split(key)
            views = jnp.stack([self.pictures.views(images, k) for k in keys])
            slope = jax.grad(loss)(state, views)
            change, memory = optimizer.update(slope, memory, state)
            return optax.apply_updates(state, change), memory

        draw, memory = np.random.default_rng(self.seed), optimizer.init(self.state)
        key, images = jax.random.key(self.seed), jnp.asarray(self.pictures.images)
        size = min(size, len(images))
        for number in range(steps):
            batch = jnp.asarray(draw.choice(len(images), size, replace=False))
            self.state, memory = step(
                self.state, memory, images[batch], jax.random.fold_in(key, number)
            )
            yield number


def by_affinity(z: np.ndarray, c: np.ndarray, k: int, eta: float) -> np.ndarray:
    """Return labels by the spectrum of Sinkhorn(C C^T / eta), the rest by subspaces."""
    draw = np.random.default_rng(0)
    anchors = draw.choice(len(z), min(ANCHORS, len(z)), replace=False)
    found = spectral_labels(
        np.asarray(membership(jnp.asarray(c[anchors]), eta, False)), k
    )
    held = []
    for j in range(k):
        part = z[anchors][found == j]
        axes = np.linalg.eigh(part.T @ part)[1][:, ::-1][:, : numerical_rank(part)]
        held.append(np.square(z @ axes).sum(axis=1))
    labels = np.argmax(held, axis=0)
    labels[anchors] = found
    return labels


def rows_of(
    name: str, z: np.ndarray, c: np.ndarray, k: int, scale: Scale
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (features, method, labels) of every way to cluster features."""
    yield name, "k-means", KMeans(k, n_init=20, random_state=0).fit_predict(z)
    for kind in ("full", "diag"):
        mixture = GaussianMixture(
            k, covariance_type=kind, n_init=3, reg_covar=1e-4, random_state=0
        )
        yield name, f"Gaussian mixture, {kind}", mixture.fit_predict(z)
    spectral = SpectralClustering(
        k, affinity="nearest_neighbors", n_neighbors=20, random_state=0
    )
    yield name, "spectral, 20 neighbours", spectral.fit_predict(z)
    own = "with network" if name == "MLC" else "affinity only"
    for eta in sorted({scale.eta, 0.1, 0.05}):
        yield name, f"MLC, {own}, eta {eta:g}", by_affinity(z, c, k, eta)


def picture(panels: dict[str, np.ndarray], classes: np.ndarray, path: Path) -> None:
    """Write |Z Z^T| of each kind of features, pictures sorted by class."""
    rng = np.random.default_rng(0)
    some = [rng.permutation(np.flatnonzero(classes == c))[:60] for c in range(10)]
    order = np.concatenate(some)

    def draw(theme: Theme) -> Figure:
        del theme
        figure = Figure(figsize=(4.2 * len(panels) + 0.8, 4.4), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for place, (name, z) in zip(axes, panels.items(), strict=True):
            shown = np.abs(z[order] @ z[order].T)
            image = place.imshow(shown, vmin=0, vmax=1, cmap="magma")
            place.grid(False)
            place.set_title(name)
            edges = np.cumsum([0, *map(len, some)])
            middles = 0.5 * (edges[1:] + edges[:-1])
            place.set_xticks(middles, range(10))
            place.set_yticks(middles, range(10))
            place.set_xlabel("class")
        axes[0].set_ylabel("class")
        figure.colorbar(image, ax=list(axes), label="|z . z'|", shrink=0.85)
        return figure

    write_atomically(path, render(draw, (LIGHT,), dpi=120)["light"])


def study(pictures: Pictures, scale: Scale, seed: int, out: Path) -> dict[str, Any]:
    """Return a seed's rows and ranks; the first seed's picture is written."""
    k, classes = int(pictures.classes.max()) + 1, pictures.classes
    trained, rows, ranks = Trained(pictures, scale, seed), [], {}
    panels, seconds, history = {}, {}, []
    flat = pictures.images.reshape(len(classes), -1)
    labels = KMeans(k, n_init=5, random_state=seed).fit_predict(flat)
    found = [("pixels", "k-means", labels)]
    for name in ("start", "MLC"):
        begun = time.perf_counter()
        if name == "start":
            trained.start()
        else:
            history = trained.go_on()
        z, c = trained.rows()
        seconds[name] = time.perf_counter() - begun
        print(f"seed {seed}: {name} in {seconds[name]:.0f} s", flush=True)
        panels["features of the start" if name == "start" else "features of MLC"] = z
        ranks[name] = {
            "all": numerical_rank(z),
            "classes": [numerical_rank(z[classes == j]) for j in range(k)],
            "ppp": PPP().fit(z).found,
        }
        found += rows_of(name, z, c, k, scale)
    for features, method, labels in found:
        rows.append(
            {
                "features": features,
                "method": method,
                "acc": accuracy(labels, classes),
                "nmi": mutual_information(labels, classes),
                "ari": adjusted_rand(labels, classes),
            }
        )
        print(rows[-1], flush=True)
    if seed == 0:
        picture(panels, classes, out / "affinity.png")
    return {
        "seed": seed,
        "seconds": seconds,
        "held_out_objective": history,
        "ranks": ranks,
        "rows": rows,
    }


def main() -> None:
    """Study seed after seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", type=Path, help="the subset; without it: digits")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=1e9, help="to begin seeds in")
    parser.add_argument("--start-steps", type=int, help="instead of the usual number")
    parser.add_argument("--steps", type=int, help="instead of the usual number")
    options = parser.parse_args()
    began = time.perf_counter()
    pictures = read_cifar(options.cifar) if options.cifar else read_digits()
    scale = Scale() if options.cifar else DIGITS
    for name in ("start_steps", "steps"):
        if getattr(options, name) is not None:
            scale = scale._replace(**{name: getattr(options, name)})
    results: dict[str, Any] = {
        "data": options.cifar.name if options.cifar else "digits of scikit-learn",
        "pictures": len(pictures.images),
        **made_with(),
        "scale": scale._asdict(),
        "seeds": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        if time.perf_counter() - began > 60 * options.minutes:
            break
        results["seeds"].append(study(pictures, scale, seed, options.out))
        write_record(options.out / "results.json", results)


if __name__ == "__main__":
    main()
