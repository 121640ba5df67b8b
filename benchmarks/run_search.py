"""Search over the experiments' own runs: who is nearest, what loss to expect, how fast.

    python benchmarks/run_search.py --out benchmarks/results/run_search.json

Seconds are of the process's processor, beside the clock's: other work may run here. The
baselines are scikit-learn's FeatureHasher of the same settings.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from sklearn.feature_extraction import FeatureHasher

from uoe_jax.bench.record import (
    ROOT,
    arguments,
    header,
    processor,
    read_record,
    write_record,
)
from uoe_jax.bench.timing import timed
from uoe_jax.config import to_json
from uoe_jax.files import format_json, read_json
from uoe_jax.presets import get_preset
from uoe_jax.runs.index import INDEX, RunIndex, open_index
from uoe_jax.runs.leaves import leaves_of, settings_of, show_path
from uoe_jax.runs.read import RunRecord
from uoe_jax.runs.search import ABSENT, History, _expect, differing, like
from uoe_jax.runs.vector import JsonVector

LEVELS = (0.5, 0.8, 0.9)


def experiment_of(record: RunRecord) -> str:
    """Return the experiment whose result a record is."""
    return Path(record.path).parts[-3]


def case_of(record: RunRecord) -> str:
    """Return the experiment and the case that a run is a seed of."""
    return f"{experiment_of(record)}/{read_json(Path(record.path))['case']}"


def key_of(record: RunRecord) -> str:
    """Return what runs with the same settings share, within their experiment."""
    return experiment_of(record) + format_json(record.settings, sort_keys=True)


def nearest(index: RunIndex) -> dict[str, Any]:
    """Section 4, line 1: other seeds first, then what differs least."""
    cases = {record.path: case_of(record) for record in index.records}
    count = Counter(cases.values())
    repeated = [r for r in index.records if count[cases[r.path]] > 1]
    first = lambda r: index.nearest(r.settings, 1, exclude=[r.path])[0][0]
    seeds = [cases[first(r).path] == cases[r.path] for r in repeated]
    firsts = {key_of(record): record for record in index.records}
    small, right = 0, 0
    for record in firsts.values():
        same = [r.path for r in index.records if r.settings == record.settings]
        others = [r for r in firsts.values() if r.settings != record.settings]
        counts = {r.path: len(differing(r.settings, record.settings)) for r in others}
        if min(counts.values()) <= 2:
            small += 1
            found = index.nearest(record.settings, 1, exclude=same)[0][0]
            right += len(differing(found.settings, record.settings)) <= 2
    return {
        "runs": len(index),
        "configurations": len(firsts),
        "runs_with_another_seed": len(repeated),
        "nearest_is_another_seed": sum(seeds) / len(seeds),
        "configurations_with_one_at_most_2_settings_away": small,
        "of_these_nearest_is_at_most_2_away": right / small,
    }


def speed(index: RunIndex) -> dict[str, Any]:
    """Seconds of a query, in a new process and later, and of indexing 1,000 runs."""
    record = index.records[40]
    found: dict[str, Any] = {"dim": index.encoder.dim}
    settings = iter(r.settings for r in index.records[:50])
    _, found["query"] = timed(lambda: index.nearest(next(settings), 5), 50)
    _, found["like_with_differences"] = timed(lambda: like(index, record, 5), 5)
    fresh = JsonVector(2048, weights=index.encoder.weights)
    encode = lambda: fresh.encode(record.settings)
    _, found["first_encoding_of_a_process"] = timed(encode)
    with tempfile.TemporaryDirectory() as name:
        folder, file = Path(name), Path(name) / INDEX
        make_runs(folder, 1000)
        read = lambda: open_index([folder], file)
        built, spent = timed(read)
        about = {"bytes": file.stat().st_size, "runs": len(built)}
        found["index_1000_runs"] = spent | about
        _, found["open_1000_runs_again"] = timed(read)
        wanted = built.records[500].settings
        _, found["query_1000_runs"] = timed(lambda: built.nearest(wanted, 5), 20)
        found["recall"] = recall_seconds(folder)
    return found


def make_runs(folder: Path, count: int) -> None:
    """Write run folders with random settings and long metrics."""
    draw, presets = np.random.default_rng(0), ("tiny", "tiny-union", "tiny-moe")
    for i in range(count):
        config = get_preset(str(draw.choice(presets)))
        optim = dataclasses.replace(
            config.optim,
            learning_rate=float(10 ** draw.uniform(-4, -2)),
            weight_decay=float(draw.choice([0.0, 0.01, 0.1])),
        )
        train = dataclasses.replace(
            config.train, steps=int(draw.integers(100, 9999)), seed=i
        )
        config = dataclasses.replace(config, name=f"r{i}", optim=optim, train=train)
        (folder / f"r{i}").mkdir()
        (folder / f"r{i}" / "config.json").write_text(to_json(config))
        lines = [
            {"kind": kind, "step": step, "seconds": step / 9, "loss": 9 / (step + 9)}
            for step in range(0, 3000, 10)
            for kind in ("train", "eval")
        ]
        text = "".join(format_json(line) + "\n" for line in lines)
        (folder / f"r{i}" / "metrics.jsonl").write_text(text)


def recall_seconds(folder: Path) -> dict[str, float]:
    """Return what the line before a training costs a process that has imported jax."""
    code = (
        "import time, jax, uoe_jax.train\n"
        "from pathlib import Path\n"
        "from uoe_jax.validation import read_config\n"
        "from uoe_jax.cli import recall\n"
        f"recall.RUNS = Path({str(folder)!r})\n"
        "config = read_config(recall.RUNS / 'r500')\n"
        "start = time.perf_counter(), time.process_time()\n"
        "assert recall.recall_line(config, Path('new'))\n"
        "print(time.perf_counter() - start[0], time.process_time() - start[1])\n"
    )
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    each = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=env
        )
        each.append([float(word) for word in done.stdout.split()])
    clock, processor = (statistics.median(column) for column in zip(*each, strict=True))
    return {"seconds": clock, "processor_seconds": processor}


def hashed(
    records: Sequence[RunRecord], weights: Any, numbers: bool, dim: int = 2048
) -> np.ndarray:
    """Return scikit-learn's hashed settings, rows of length one."""
    rows = []
    for record in records:
        row: dict[str, float] = {}
        for leaf in leaves_of(record.settings):
            factor = weights.get(leaf.path, 1.0) if weights else 1.0
            name = show_path(leaf.path)
            if numbers and leaf.kind == "number":
                row[name] = factor * leaf.value
            else:
                row[f"{name}={leaf.value}"] = factor
        rows.append(row)
    table = FeatureHasher(dim).transform(rows).toarray()
    return table / np.linalg.norm(table, axis=1, keepdims=True)


def prediction(index: RunIndex) -> dict[str, Any]:
    """Section 3's table: error of the loss, its configuration left out."""
    firsts = list({key_of(r): r for r in reversed(index.records)}.values())
    losses: dict[str, list[float]] = {}
    for record in index.records:
        losses.setdefault(key_of(record), []).append(record.outcome["loss"])
    means = np.array([np.mean(losses[key_of(r)]) for r in firsts])
    groups = np.array([experiment_of(r) for r in firsts])
    settings = [r.settings for r in firsts]
    weights = index.encoder.weights
    encoders = {
        "MBAT as in the paper, thermometers": {"number": "thermometer"}
        | {"weights": "paper"},
        "MBAT as in the paper, Fourier numbers": {"weights": "paper"},
        "MBAT per leaf": {},
        "MBAT per leaf, diversity weights": {"weights": weights},
    }
    hashes = {
        "FeatureHasher path=value": (None, False),
        "FeatureHasher path=value, diversity weights": (weights, False),
        "FeatureHasher, numbers as values, diversity weights": (weights, True),
    }
    vectors = {
        name: JsonVector(**how).encode_many(settings) for name, how in encoders.items()
    } | {name: hashed(firsts, *how) for name, how in hashes.items()}
    counts = _counts(settings)
    upper = np.triu_indices(len(firsts), 1)
    table = {}
    for name, rows in vectors.items():
        cosines = np.asarray(rows @ rows.T, float)
        where = cosines, means, groups
        table[name] = {
            "k=1": _error(*where, 1, False),
            "k=3": _error(*where, 3, False),
            "k=3, weighted by 1 / (1 - cosine)": _error(*where, 3, True),
            "rank correlation with differing leaves": float(
                -spearmanr(cosines[upper], counts[upper]).statistic
            ),
            "cosine where one leaf differs": _mean(cosines[upper][counts[upper] == 1]),
            "cosine where ten differ": _mean(cosines[upper][counts[upper] == 10]),
        }
    flat = _error(np.zeros((len(firsts),) * 2), means, groups, len(firsts), False)
    return {
        "configurations": len(firsts),
        "leaves": len({l.path for s in settings for l in leaves_of(s)}),
        "mean of the experiment": flat,
        "error / standard deviation": table,
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _counts(settings: Sequence[Any]) -> np.ndarray:
    each = [settings_of(s) for s in settings]
    paths = sorted({p for s in each for p in s}, key=show_path)
    codes = np.array(
        [[hash(repr(s.get(p, ABSENT))) for p in paths] for s in each], np.int64
    )
    return (codes[:, None] != codes[None]).sum(axis=2)


def _error(
    cosines: np.ndarray, means: np.ndarray, groups: np.ndarray, k: int, weighted: bool
) -> float:
    """Mean absolute error over the standard deviation within the experiment."""
    misses = []
    for group in np.unique(groups):
        mine = np.flatnonzero(groups == group)
        spread = means[mine].std()
        for i in mine:
            rest = mine[mine != i]
            best = rest[np.argsort(-cosines[i, rest], kind="stable")[:k]]
            weight = 1 / (1.001 - cosines[i, best]) if weighted else np.ones(len(best))
            misses.append(abs(weight @ means[best] / weight.sum() - means[i]) / spread)
    return float(np.mean(misses))


def coverage(index: RunIndex) -> dict[str, Any]:
    """How often the interval of `uoe runs expect` holds a left-out run's loss."""
    found = {}
    for level in LEVELS:
        inside, silent, widths = [], 0, []
        for group in sorted({experiment_of(r) for r in index.records}):
            runs = [r for r in index.records if experiment_of(r) == group]
            spread = np.std([r.outcome["loss"] for r in runs])
            for key in sorted({key_of(r) for r in runs}):
                own = [r for r in runs if key_of(r) == key]
                rest = [r for r in runs if key_of(r) != key]
                said = _expect(index, own[0], History(index, rest, "loss"), level)
                if said.loss is None or said.low is None or said.high is None:
                    silent += len(own)
                    continue
                inside += [said.low <= r.outcome["loss"] <= said.high for r in own]
                widths.append((said.high - said.low) / 2 / spread)
        found[f"{level:.0%}"] = {
            "covered": float(np.mean(inside)),
            "runs": len(inside),
            "nothing_said": silent,
            "median_half_width_over_deviation": float(np.median(widths)),
        }
    return found


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__)
    parser.add_argument("--speed", action="store_true", help="that part of --out anew")
    options = parser.parse_args()
    index = open_index([ROOT / "experiments"])
    index.records = [r for r in index.records if r.outcome.get("loss") is not None]
    about: dict[str, Any] = header(stated=options.commit, device=processor())
    about["versions"] = {n: version(n) for n in ("numpy", "scipy", "scikit-learn")}
    about["load_average"] = os.getloadavg()[0]
    if options.speed:
        found = read_record(options.out) | {"speed": {**about, **speed(index)}}
    else:
        found = about | {"nearest": nearest(index), "prediction": prediction(index)}
        found |= {"intervals": coverage(index), "speed": speed(index)}
    print(format_json(found, indent=1))
    write_record(options.out, found)


if __name__ == "__main__":
    main()
