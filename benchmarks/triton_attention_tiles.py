"""Time the tiles of the Triton attention kernels on this GPU; print its tuning entries.

    python benchmarks/triton_attention_tiles.py --out tiles.json

One kernel's tile changes at a time, the others keep their defaults: forward tiles are
timed in the forward pass, the rest in both passes. The lists printed belong under
"tiles" in `uoe_jax/ops/tuning/<device>.json`.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import bench_attention as bench
import jax
import jax.numpy as jnp

from uoe_jax.files import format_json
from uoe_jax.ops import nvidia
from uoe_jax.ops.segment_attention.nvidia import triton
from uoe_jax.ops.segment_attention.nvidia.triton import Tiles

CASES = [  # causal, segments, rows of each, H
    (True, 16, 2048, 64),
    (True, 8, 8192, 64),
    (True, 16, 2048, 128),
    (True, 8, 8192, 128),
    (False, 8, 4096, 128),
]
QUERY_TILES = [
    Tiles(128, 64, 4, 3),
    Tiles(128, 64, 8, 3),
    Tiles(128, 64, 8, 2),
    Tiles(128, 128, 8, 2),
    Tiles(128, 32, 4, 3),
    Tiles(128, 32, 8, 3),
    Tiles(64, 64, 4, 3),
]
CANDIDATES = {
    "forward": QUERY_TILES,
    "query_gradient": QUERY_TILES,
    "key_gradients": [
        Tiles(128, 32, 8, 3),
        Tiles(128, 64, 8, 3),
        Tiles(128, 64, 8, 2),
        Tiles(64, 64, 8, 2),
        Tiles(64, 64, 4, 3),
        Tiles(64, 32, 4, 3),
    ],
}


def time_tile(kernel, tiles, case, rounds) -> dict[str, Any]:
    """One measurement, or why there is none."""
    causal, count, rows, width = case
    choose = triton.choose_tiles
    mine = lambda name, shape: tiles if name == kernel else choose(name, shape)
    function = partial(bench.attend, causal=causal, backend=triton)
    sets = bench.packed_sets([rows] * count, width)
    if kernel == "forward":
        args = [(q, k, v, offsets) for q, k, v, _, offsets in sets]
    else:
        args = [(q, k, v, offsets, grad) for q, k, v, grad, offsets in sets]
        function = partial(bench.both_passes, function)
    with mock.patch.object(triton, "choose_tiles", mine):
        try:
            milliseconds = bench.seconds(function, args, rounds) * 1e3
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            return {"tile": tiles._asdict(), "error": str(error)[:200]}
    return {"tile": tiles._asdict(), "ms": milliseconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="file to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, help="of the heads; default: 64 and 128")
    args = parser.parse_args()
    try:
        nvidia.require(jnp.bfloat16)
    except NotImplementedError as error:
        parser.error(str(error))
    found: dict[str, list] = {}
    for case in (c for c in CASES if args.width in (None, c[3])):
        causal, count, rows, width = case
        shape = {"rows": count * rows, "groups": 1, "width": width}
        shape |= {"causal": causal, "dtype": "bfloat16"}
        for kernel, candidates in CANDIDATES.items():
            fit = [
                tiles
                for tiles in candidates
                if triton.shared_bytes(kernel, width, 2, tiles)
                <= nvidia.shared_memory()
            ]
            lines = [time_tile(kernel, tiles, case, args.rounds) for tiles in fit]
            for line in lines:
                print(shape, kernel, line, flush=True)
            timed = [line for line in lines if "ms" in line]
            if timed:
                best = min(timed, key=lambda line: line["ms"])
                entry = {"shape": shape, **best}
                found.setdefault(f"segment_attention_{kernel}", []).append(entry)
            if args.out:
                Path(args.out).write_text(format_json({"tiles": found}, indent=1))
    print(format_json(found, indent=1))


if __name__ == "__main__":
    main()
