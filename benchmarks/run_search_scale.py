"""An index of many objects of 60 leaves: bytes, seconds, exact and approximate recall.

    python benchmarks/run_search_scale.py --objects 100000 --dim 512 \\
        --out benchmarks/results/run_search_scale.json

Objects are made up: 20 words, 12 truth values, 20 numbers from small sets, and 8 that
are never the same twice. A query is an object with 3 leaves changed; it is found if
the object it was made of is nearest. usearch is used where it is installed. Seconds are
the processor's unless they are the clock's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from run_search import about

from uoe_jax.errors import MissingExtra
from uoe_jax.files import format_json
from uoe_jax.runs.approximate import CANDIDATES, NeighbourGraph
from uoe_jax.runs.diversity import Diversity
from uoe_jax.runs.index import encode_rows, similarities
from uoe_jax.runs.leaves import leaves_of
from uoe_jax.runs.vector import JsonVector

WORDS = [f"word{i}" for i in range(40)]
SIZES = [2.0**i for i in range(12)]
_SAMPLE = 20_000  # objects that weights are counted from


def make_object(number: int) -> dict[str, Any]:
    """Return one object of 60 leaves, two keys deep."""
    draw = np.random.Generator(np.random.SFC64(number))
    words, sizes = draw.integers(40, size=20), draw.integers(12, size=20)
    truths, free = draw.integers(2, size=12), draw.random(8)
    return {
        "names": {f"n{i}": WORDS[w] for i, w in enumerate(words)},
        "flags": {f"f{i}": bool(t) for i, t in enumerate(truths)},
        "sizes": {f"s{i}": SIZES[s] for i, s in enumerate(sizes)},
        "free": {f"x{i}": float(10 ** (6 * x - 4)) for i, x in enumerate(free)},
    }


def make_objects(count: int) -> Iterator[dict[str, Any]]:
    """Yield the objects, one after the other."""
    return map(make_object, range(count))


def changed(number: int) -> dict[str, Any]:
    """Return an object with a word, a size and a free number changed."""
    value = make_object(number)
    value["names"]["n3"] = "another"
    value["sizes"]["s5"] = 3.0
    value["free"]["x2"] *= 1.5
    return value


def exact(rows: np.ndarray, queries: np.ndarray, wanted: np.ndarray) -> dict[str, Any]:
    """Return recall and seconds of the whole product, and the ten nearest of each."""
    nearest, seconds, clock = [], [], []
    for query in queries:
        start = time.process_time(), time.perf_counter()
        cosines = similarities(rows, query)
        best = np.argpartition(-cosines, 10)[:10]
        nearest.append(best[np.argsort(-cosines[best])])
        seconds.append(time.process_time() - start[0])
        clock.append(time.perf_counter() - start[1])
    found = np.stack(nearest)
    return {
        "recall_at_1": float((found[:, 0] == wanted).mean()),
        "seconds_a_query": float(np.median(seconds)),
        "clock_seconds_a_query": float(np.median(clock)),
        "nearest": found,
    }


def approximate(
    rows: np.ndarray, queries: np.ndarray, wanted: np.ndarray, truth: np.ndarray
) -> dict[str, Any]:
    """Return recall, seconds and bytes of usearch's graph."""
    start = time.process_time(), time.perf_counter()
    try:
        graph = NeighbourGraph(rows, threads=1)
    except MissingExtra as error:
        return {"missing": str(error)}
    built = time.process_time() - start[0], time.perf_counter() - start[1]
    searches = {}
    for candidates in (64, 256, CANDIDATES, 4 * CANDIDATES):
        graph.candidates = candidates
        began = time.process_time()
        found = graph.nearest(queries, 10)
        spent = (time.process_time() - began) / len(queries)
        shared = [len(set(a) & set(b)) for a, b in zip(found, truth, strict=True)]
        searches[str(candidates)] = {
            "seconds_a_query": spent,
            "recall_at_1": float((found[:, 0] == wanted).mean()),
            "recall_at_10_of_exact": float(np.mean(shared) / 10),
        }
    return {
        "version": version("usearch"),
        "build_seconds": built[0],
        "build_clock_seconds": built[1],
        "bytes": graph.nbytes,
        "candidates": searches,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    count = options.objects

    start = time.process_time()
    for _ in make_objects(2000):
        pass
    making = (time.process_time() - start) / 2000

    start = time.process_time()
    seen = Diversity()
    for value in make_objects(min(count, _SAMPLE)):
        seen.add(leaves_of(value))
    counting = time.process_time() - start
    encoder = JsonVector(options.dim, weights=seen.weights())
    start = time.process_time(), time.perf_counter()
    rows = encode_rows(encoder, make_objects(count), count, True)
    spent = time.process_time() - start[0], time.perf_counter() - start[1]

    wanted = np.random.default_rng(1).integers(count, size=options.queries)
    queries = encoder.encode_many(changed(int(i)) for i in wanted)
    found = exact(rows, queries, wanted)
    truth = found.pop("nearest")
    result = {
        "about": about(("numpy",)),
        "objects": count,
        "leaves": len(leaves_of(make_object(0))),
        "dim": options.dim,
        "weights_from_objects": min(count, _SAMPLE),
        "weights_seconds": counting,
        "encode_seconds": spent[0] - making * count,
        "encode_clock_seconds": spent[1],
        "encode_milliseconds_an_object": 1e3 * (spent[0] / count - making),
        "make_milliseconds_an_object": 1e3 * making,
        "vector_bytes": rows.nbytes,
        "exact": found,
        "usearch": approximate(rows, queries, wanted, truth),
    }
    for dim in (512, 2048):
        fresh = JsonVector(dim, weights=seen.weights())
        start = time.process_time()
        fresh.encode_many(make_objects(2000))
        each = 1e3 * ((time.process_time() - start) / 2000 - making)
        result[f"encode_milliseconds_an_object_dim_{dim}_of_2000"] = each
    text = format_json(result, indent=1) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
