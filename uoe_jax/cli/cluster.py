"""`uoe cluster`: which points of an array belong together, and how many kinds."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from uoe_jax.appearing import appearing_together
from uoe_jax.cli.parse import parse
from uoe_jax.cluster.method import METHODS, Method
from uoe_jax.errors import ConfigError, MissingExtra, extra_packages, shown
from uoe_jax.escape import escape_line
from uoe_jax.fields import INT32_MAX, Checked, Seed
from uoe_jax.files import format_json, write_atomically
from uoe_jax.report.table import format_table

if TYPE_CHECKING:
    from uoe_jax.cluster.methods import Clustered
    from uoe_jax.cluster.read import Data

_SCORES = ["ACC", "NMI", "ARI"]


@dataclass(frozen=True, kw_only=True)
class ClusterOptions(Checked):
    """Cluster the points of an array, and find how many clusters there are.

    FILE is .npz with `points` [N, D], or with one table only, or .npy. If it holds
    `labels` [N], accuracy and mutual information against them are printed. Writes
    labels.npy, report.json and clusters.png.
    """

    file: Positional[Annotated[Path, arg(metavar="FILE")]]
    # PPP; MLC with its network; spectral: MLC's affinity alone; scikit-learn's k-means.
    method: Method = "ppp"
    k: str = "auto"  # number of clusters; auto: PPP finds it
    compare: bool = False  # all methods, a row each; files are of --method
    seed: Seed = 0  # of networks, anchors and k-means' starts; PPP draws nothing
    json: bool = False  # one JSON object instead of tables
    out: Path | None = None  # folder, written over; None: FILE's name + _clusters

    def __post_init__(self) -> None:
        super().__post_init__()
        number = int(self.k) if self.k.isdecimal() and len(self.k) < 11 else 0
        if self.k != "auto" and not 1 <= number <= INT32_MAX:
            raise ConfigError(
                f"k is {shown(self.k)}; give a whole number from 1 on or 'auto'"
            )

    @property
    def num_clusters(self) -> int | None:
        """The number asked for; None: it is to be found."""
        return None if self.k == "auto" else int(self.k)


def cluster(args: list[str]) -> int:
    """Cluster a file's points; jax is imported only once the options are right."""
    options = parse(ClusterOptions, args, "cluster")
    out = options.out or options.file.with_name(f"{options.file.stem}_clusters")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a folder with --out")

    from uoe_jax.cluster.methods import cluster_points
    from uoe_jax.cluster.read import read_points

    data = read_points(options.file)
    with extra_packages():  # before any work: ACC and k-means want them
        if data.classes is not None:
            import scipy.optimize  # noqa: F401
        if options.compare or options.method == "kmeans":
            import sklearn.cluster  # noqa: F401
    found: dict[str, Clustered] = {}
    for method in METHODS if options.compare else (options.method,):
        if method == "mlc":
            print("mlc trains a network first", file=sys.stderr)
        found[method] = cluster_points(
            data.points,
            method,
            options.num_clusters,
            classes=data.classes,
            seed=options.seed,
        )
    chosen = found[options.method]
    report = {
        "file": str(options.file),
        "points": list(data.points.shape),
        **_facts(chosen),
        "seed": options.seed,
        "details": chosen.details,
    }
    if options.compare:
        report["compared"] = [_facts(each) for each in found.values()]
    written = _write(out, data, chosen, report)
    if options.json:
        print(format_json(report, indent=1))
        return 0
    if options.compare:
        print(_comparison(found) + "\n")
    _describe(options.file, chosen, data)
    print(escape_line(f"{out}: {', '.join(written)}"))
    return 0


def _facts(found: Clustered) -> dict[str, Any]:
    return {
        "method": found.method,
        "k": len(found.sizes),
        "how": found.how,
        "sizes": found.sizes,
        "ranks": found.ranks,
        **found.scores,
        "seconds": round(found.seconds, 3),
    }


def _describe(file: Path, found: Clustered, data: Data) -> None:
    """Print what was found: a line, the scores, and a row a cluster."""
    count, width = data.points.shape
    k = len(found.sizes)
    print(
        escape_line(
            f"{file}: {count:,} points of {width:,} numbers; {found.method}: {k} "
            f"cluster{'s' * (k != 1)}, {found.how}"
        )
    )
    if scores := found.scores:
        print(f"against labels: {', '.join(_shown(scores))}")
    rows = [
        [number, f"{size:,}", f"{size / count:.1%}", rank]
        for number, (size, rank) in enumerate(
            zip(found.sizes, found.ranks, strict=True)
        )
    ]
    print(format_table(["cluster", "size", "share", "rank"], rows))


def _shown(scores: dict[str, float]) -> list[str]:
    pairs = zip(_SCORES, scores.values(), strict=True)
    return [f"{name} {score:.3f}" for name, score in pairs]


def _comparison(found: dict[str, Clustered]) -> str:
    """Return a table with a row a method."""
    header = ["method", "k", "largest", "smallest", "mean rank", "seconds"]
    rows: list[list[object]] = []
    for method, each in found.items():
        sizes = f"{max(each.sizes):,}", f"{min(each.sizes):,}"
        rank = f"{sum(each.ranks) / len(each.ranks):.1f}"
        rows.append([method, len(each.sizes), *sizes, rank, f"{each.seconds:.2f}"])
        rows[-1] += [f"{score:.3f}" for score in each.scores.values()]
    if next(iter(found.values())).scores:
        header += _SCORES
    return format_table(header, rows)


def _write(
    out: Path, data: Data, found: Clustered, report: dict[str, Any]
) -> list[str]:
    """Write labels, report and, where matplotlib is, a picture; return their names."""
    file = io.BytesIO()
    np.save(file, found.labels, allow_pickle=False)
    with appearing_together(out) as unfinished:
        write_atomically(unfinished / "labels.npy", file.getvalue())
        write_atomically(unfinished / "report.json", format_json(report, indent=1))
        try:
            from uoe_jax.cluster.plot import plot_clusters
        except MissingExtra as error:
            print(f"no clusters.png: {error}", file=sys.stderr)
            return ["labels.npy", "report.json"]
        plot_clusters(data.points, found.labels, unfinished / "clusters.png")
    return ["labels.npy", "report.json", "clusters.png"]
