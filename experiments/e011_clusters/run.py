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
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.cluster import KMeans

from experiments.e011_clusters.affinity import TITLES, draw_affinity
from experiments.e011_clusters.pictures import Pictures, read_cifar, read_digits
from experiments.e011_clusters.record import Record
from experiments.e011_clusters.rows import add_rows, methods
from experiments.e011_clusters.training import DIGITS, Scale, Trained
from uoe_jax.bench.record import header
from uoe_jax.cluster.metrics import numerical_rank


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
        draw_affinity({name: z for name, (z, _) in rows.items()}, classes, out)
    for name, (z, c) in rows.items():
        add_rows(name, methods(name, z, c, k, scale), classes, record, seed)
    flat = pictures.images.reshape(len(classes), -1)
    pixels = {"k-means": lambda: KMeans(k, n_init=3, random_state=0).fit_predict(flat)}
    add_rows("pixels", pixels, classes, record, seed)


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
