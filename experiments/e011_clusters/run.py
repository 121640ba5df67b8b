"""Cluster pictures by MLC, with its network and by its affinity only, beside peers.

    python -m experiments.e011_clusters.run --cifar cifar10_jpg_8k2k.npz --out runs/e011
    python -m experiments.e011_clusters.run --out runs/e011-digits   # digits, on a CPU

A network is trained for features that are spread out and the same for two random views
(the start of MLC). k-means, a Gaussian mixture, spectral clustering and MLC's affinity
cluster these features. Then the network goes on for R - Rc; the best by that of a
held-out batch is kept. Every row is written when it is there, and trained weights are
kept: the same line goes on where the last one ended.
"""

from __future__ import annotations

import argparse
import functools
import io
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
from uoe_jax.bench.record import header, read_record, write_record
from uoe_jax.cluster.metrics import (
    accuracy,
    adjusted_rand,
    mutual_information,
    numerical_rank,
)
from uoe_jax.cluster.objective import membership, start_value, value
from uoe_jax.cluster.spectral import spectral_labels
from uoe_jax.files import write_atomically
from uoe_jax.report.style import LIGHT, Theme, render

TITLES = {"start": "the start", "MLC": "MLC"}
TIMED = 20  # steps that tell how long the others take
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


def methods(
    features: str, z: np.ndarray, c: np.ndarray, k: int, scale: Scale
) -> dict[str, Callable[[], np.ndarray]]:
    """Return every way to cluster features, the most telling first."""
    own = "with network" if features == "MLC" else "affinity only"
    found: dict[str, Callable[[], np.ndarray]] = {}
    for eta in sorted({scale.eta, 0.1, 0.05}, reverse=True):
        name = f"MLC, {own}, eta {eta:g}"
        found[name] = functools.partial(by_affinity, z, c, k, eta)
    found["k-means"] = lambda: KMeans(k, n_init=10, random_state=0).fit_predict(z)
    for kind in ("full", "diag"):
        mixture = GaussianMixture(
            k, covariance_type=kind, reg_covar=1e-4, random_state=0
        )
        found[f"Gaussian mixture, {kind}"] = functools.partial(mixture.fit_predict, z)
    spectral = SpectralClustering(
        k, affinity="nearest_neighbors", n_neighbors=20, random_state=0
    )
    found["spectral, 20 neighbours"] = lambda: spectral.fit_predict(z)
    return found


def picture(panels: dict[str, np.ndarray], classes: np.ndarray, out: Path) -> None:
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
            place.set_title(f"features of {TITLES[name]}")
            edges = np.cumsum([0, *map(len, some)])
            middles = 0.5 * (edges[1:] + edges[:-1])
            place.set_xticks(middles, range(10))
            place.set_yticks(middles, range(10))
            place.set_xlabel("class")
        axes[0].set_ylabel("class")
        figure.colorbar(image, ax=list(axes), label="|z . z'|", shrink=0.85)
        return figure

    content = render(draw, (LIGHT,), dpi=120)["light"]
    write_atomically(out / "affinity.png", content)


class Record:
    """A study's results, written after every row."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path, self._began = path, time.perf_counter()
        found = read_record(path)
        for name in ("data", "pictures", "scale"):
            if found and found[name] != facts[name]:
                raise SystemExit(
                    f"{path} has results of {name} {found[name]}, and this is "
                    f"{facts[name]}; take another --out"
                )
        self.found = found | facts | {"seeds": found.get("seeds", [])}
        write_record(path, self.found)  # before any weights are there

    def seed(self, seed: int) -> dict[str, Any]:
        """Return what is known of a seed, to be added to."""
        known = {each["seed"]: each for each in self.found["seeds"]}
        if seed not in known:
            empty = {"seed": seed, "seconds": {}, "steps": {}, "ranks": {}, "rows": []}
            self.found["seeds"].append(empty)
        return self.found["seeds"][-1] if seed not in known else known[seed]

    def write(self, what: str) -> None:
        """Write everything, and say what is new and when."""
        print(f"[{time.perf_counter() - self._began:5.0f} s] {what}", flush=True)
        write_record(self.path, self.found)

    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self._began

    def steps(self, name: str) -> int | None:
        """Return the steps that the first seed took, as all others do; None: none."""
        taken = [each["steps"].get(name) for each in self.found["seeds"]]
        return next((steps for steps in taken if steps), None)

    def needs(self, names: Sequence[str]) -> float:
        """Return the seconds that trainings took of the seed where they took most."""
        spent = [
            sum(each["seconds"].get(name, 0.0) for name in names)
            for each in self.found["seeds"]
        ]
        return max(spent, default=0.0)


def weights(out: Path, seed: int, name: str) -> Path:
    """Return where the weights of a seed lie, of the start or of MLC."""
    return out / f"weights-{seed}-{name}.npz"


def study_seeds(
    pictures: Pictures, scale: Scale, seeds: Sequence[int], record: Record, end: float
) -> None:
    """Study seed after seed; those that aren't trained yet share the time alike.

    The first one's steps are the others': one that can't have them isn't begun.
    """
    out = record.path.parent
    lacks = lambda s: [n for n in TITLES if not weights(out, s, n).is_file()]
    for place, seed in enumerate(seeds):
        left, share = end - record.seconds(), 0.0
        if names := lacks(seed):
            if left <= record.needs(names):
                print(f"no time to train seed {seed}: the same line goes on")
                return
            share = left / sum(bool(lacks(other)) for other in seeds[place:])
        study(pictures, scale, seed, record, share)


def study(
    pictures: Pictures, scale: Scale, seed: int, record: Record, seconds: float
) -> None:
    """Add a seed's rows and ranks that are missing; train in so many seconds."""
    out, end = record.path.parent, record.seconds() + seconds
    classes, found = pictures.classes, record.seed(seed)
    k, trained = int(classes.max()) + 1, Trained(pictures, scale, seed)
    rows = {}
    for name, share in (("start", 0.6), ("MLC", 0.9)):
        path = weights(out, seed, name)
        if path.is_file():
            trained.load(path)
        else:
            begun = time.perf_counter()
            steps = record.steps(name)
            left = max(share * (end - record.seconds()), 1.0)
            amount = (left, None) if steps is None else (np.inf, steps)
            if name == "start":
                taken = trained.start(*amount)
            else:
                taken, found["held_out_objective"] = trained.go_on(*amount)
            found["steps"][name] = taken
            found["seconds"][name] = time.perf_counter() - begun
            trained.save(path)
            record.write(f"seed {seed}: {name} in {found['seconds'][name]:.0f} s")
        rows[name] = trained.rows()
        z = rows[name][0]
        found["ranks"][name] = {
            "all": numerical_rank(z),
            "classes": [numerical_rank(z[classes == j]) for j in range(k)],
        }
    if seed == 0:
        picture({name: z for name, (z, _) in rows.items()}, classes, out)
    for name, (z, c) in rows.items():
        add_rows(name, methods(name, z, c, k, scale), classes, record, seed)
    flat = pictures.images.reshape(len(classes), -1)
    pixels = {"k-means": lambda: KMeans(k, n_init=3, random_state=0).fit_predict(flat)}
    add_rows("pixels", pixels, classes, record, seed)


def add_rows(
    features: str,
    ways: dict[str, Callable[[], np.ndarray]],
    classes: np.ndarray,
    record: Record,
    seed: int,
) -> None:
    """Cluster features by each method whose row is missing; write after each."""
    rows = record.seed(seed)["rows"]
    done = {(row["features"], row["method"]) for row in rows}
    for method, labels_of in ways.items():
        if (features, method) in done:
            continue
        begun = time.perf_counter()
        labels = labels_of()
        row = {
            "features": features,
            "method": method,
            "acc": accuracy(labels, classes),
            "nmi": mutual_information(labels, classes),
            "ari": adjusted_rand(labels, classes),
            "seconds": time.perf_counter() - begun,
            "commit": record.found["commit"],
        }
        rows.append(row)
        figures = f"ACC {row['acc']:.3f} NMI {row['nmi']:.3f} ARI {row['ari']:.3f}"
        record.write(
            f"seed {seed}, {features}, {method}: {figures}, {row['seconds']:.1f} s"
        )


def main() -> None:
    """Study seed after seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", type=Path, help="the subset; without it: digits")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=1e9, help="to train in")
    parser.add_argument("--start-steps", type=int, help="instead of the usual number")
    parser.add_argument("--steps", type=int, help="instead of the usual number")
    parser.add_argument("--points", type=int, help="instead of all pictures")
    options = parser.parse_args()
    pictures = read_cifar(options.cifar) if options.cifar else read_digits()
    if options.points is not None:
        some = slice(options.points)
        few = pictures.images[some], pictures.classes[some], pictures.held[some]
        pictures = Pictures(*few, pictures.views)
    scale = Scale() if options.cifar else DIGITS
    for name in ("start_steps", "steps"):
        if getattr(options, name) is not None:
            scale = scale._replace(**{name: getattr(options, name)})
    facts = {
        "data": options.cifar.name if options.cifar else "digits of scikit-learn",
        "pictures": len(pictures.images),
        **header(f"python -m experiments.e011_clusters.run {shlex.join(sys.argv[1:])}"),
        "scale": {name: as_stored(value) for name, value in scale._asdict().items()},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    record = Record(options.out / "results.json", facts)
    study_seeds(pictures, scale, options.seeds, record, 60 * options.minutes)


def as_stored(value: Any) -> Any:
    """Return a value as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


if __name__ == "__main__":
    main()
