"""An index of many objects of 60 leaves: bytes, seconds, exact and approximate recall.

    python benchmarks/run_search_scale.py --objects 100000 --dim 512 \\
        --out benchmarks/results/run_search_scale.json

Objects are made up: 20 words, 12 truth values, 20 numbers from small sets, and 8 that
are never the same twice. A query is an object with 3 leaves changed; it is found if
the object it was made of is nearest. The file has a row for each number of objects.
usearch is used where it is installed. Seconds are the processor's unless they are the
clock's.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np

from uoe_jax.bench.record import arguments, header, processor, read_record, write_record
from uoe_jax.bench.timing import timed
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

    def ten(query: np.ndarray) -> np.ndarray:
        cosines = similarities(rows, query)
        best = np.argpartition(-cosines, 10)[:10]
        return best[np.argsort(-cosines[best])]

    nearest, spent = zip(*(timed(partial(ten, q)) for q in queries), strict=True)
    found = np.stack(nearest)
    middle = lambda clock: float(np.median([one[clock] for one in spent]))
    return {
        "recall_at_1": float((found[:, 0] == wanted).mean()),
        "seconds_a_query": middle("processor_seconds"),
        "clock_seconds_a_query": middle("seconds"),
        "nearest": found,
    }


def approximate(
    rows: np.ndarray, queries: np.ndarray, wanted: np.ndarray, truth: np.ndarray
) -> dict[str, Any]:
    """Return recall, seconds and bytes of usearch's graph."""
    try:
        graph, built = timed(lambda: NeighbourGraph(rows, threads=1))
    except MissingExtra as error:
        return {"missing": str(error)}
    searches = {}
    for candidates in (64, 256, CANDIDATES, 4 * CANDIDATES):
        graph.candidates = candidates
        found, spent = timed(lambda: graph.nearest(queries, 10))
        shared = [len(set(a) & set(b)) for a, b in zip(found, truth, strict=True)]
        searches[str(candidates)] = {
            "seconds_a_query": spent["processor_seconds"] / len(queries),
            "recall_at_1": float((found[:, 0] == wanted).mean()),
            "recall_at_10_of_exact": float(np.mean(shared) / 10),
        }
    return {
        "version": version("usearch"),
        "build_seconds": built["processor_seconds"],
        "build_clock_seconds": built["seconds"],
        "bytes": graph.nbytes,
        "candidates": searches,
    }


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__)
    parser.add_argument("--objects", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=200)
    options = parser.parse_args()
    count = options.objects

    _, spent = timed(lambda: deque(make_objects(2000), maxlen=0))
    making = spent["processor_seconds"] / 2000
    seen = Diversity()
    _, counting = timed(
        lambda: [seen.add(leaves_of(x)) for x in make_objects(min(count, _SAMPLE))]
    )
    encoder = JsonVector(options.dim, weights=seen.weights())
    encode = lambda: encode_rows(encoder, make_objects(count), count, True)
    rows, spent = timed(encode)

    wanted = np.random.default_rng(1).integers(count, size=options.queries)
    queries = encoder.encode_many(changed(int(i)) for i in wanted)
    found = exact(rows, queries, wanted)
    truth = found.pop("nearest")
    result = {
        **header(stated=options.commit, device=processor()),
        "load_average": os.getloadavg()[0],
        "objects": count,
        "leaves": len(leaves_of(make_object(0))),
        "dim": options.dim,
        "weights_from_objects": min(count, _SAMPLE),
        "weights_seconds": counting["processor_seconds"],
        "encode_seconds": spent["processor_seconds"] - making * count,
        "encode_clock_seconds": spent["seconds"],
        "encode_milliseconds_an_object": 1e3
        * (spent["processor_seconds"] / count - making),
        "make_milliseconds_an_object": 1e3 * making,
        "vector_bytes": rows.nbytes,
        "exact": found,
        "usearch": approximate(rows, queries, wanted, truth),
    }
    for dim in (512, 2048):
        fresh = JsonVector(dim, weights=seen.weights())
        _, spent = timed(partial(fresh.encode_many, make_objects(2000)))
        each = 1e3 * (spent["processor_seconds"] / 2000 - making)
        result[f"encode_milliseconds_an_object_dim_{dim}_of_2000"] = each
    print(format_json(result, indent=1))
    same = lambda row: (row["objects"], row["dim"]) == (count, options.dim)
    rows = [r for r in read_record(options.out).get("results", []) if not same(r)]
    write_record(options.out, {"results": [*rows, result]})


if __name__ == "__main__":
    main()
