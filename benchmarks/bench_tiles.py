"""Layers of unions that no table of tiles was measured for, before and after.

    python benchmarks/bench_tiles.py --out benchmarks/results/tiles_h200.json

Each MLP layer, forward and backward, with the tiles of the nearest measured shapes
("nearest") and with those that the device's model of products predicts ("predicted"),
in one process, their repeats in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import jax

from uoe_jax.bench.gemm import run_once, time_in_turn
from uoe_jax.bench.gemm_cases import UNTUNED
from uoe_jax.bench.record import add_options, header, write_record
from uoe_jax.bench.union import layer_config, layer_program
from uoe_jax.config import UnionConfig
from uoe_jax.model.mlp import UnionMlp
from uoe_jax.ops.grouped_matmul.nvidia import launch, tiles


def nearest_tiles(op: str, shape: dict[str, Any]) -> tiles.Tiles:
    """Return the tile that the tables alone give."""
    with mock.patch.object(tiles, "predict_tiles", lambda op, shape: None):
        return tiles.choose_tiles(op, shape)


def build(union: tuple, choose: Any, found: list) -> tuple[Any, tuple]:
    """Return a union's lowered MLP layer and its arguments; notes its tiles."""
    width, mlp, experts, picks, tokens, _ = union
    config = dataclasses.replace(
        layer_config(width, mlp, experts, width // experts, tokens // 2, picks),
        activation="swiglu",
        use_bias=False,
        union=UnionConfig(num_experts=experts, top_k=picks),
    )
    program = layer_program(
        UnionMlp, config, shape=(2, tokens // 2), dtype="bfloat16", op="", case="",
        name="",
    )  # fmt: skip

    def note(op: str, shape: dict[str, Any]) -> tiles.Tiles:
        tile = choose(op, shape)
        found.append({"op": op, **shape, "tile": list(tile)})
        return tile

    with mock.patch.object(launch, "choose_tiles", note):
        jax.clear_caches()  # programs traced with other tiles
        lowered = jax.jit(program.fun).lower(*program.args)
    return lowered, program.args


def compile_one(lowered: Any) -> Any:
    return lowered.compile()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    args = parser.parse_args(argv)
    record: dict[str, Any] = {
        **header("python benchmarks/bench_tiles.py " + " ".join(argv), args.commit),
        "results": [],
    }
    ways = {"nearest": nearest_tiles, "predicted": tiles.choose_tiles}
    for union in UNTUNED:
        taken: dict[str, list] = {way: [] for way in ways}
        built = {way: build(union, ways[way], taken[way]) for way in ways}
        with ThreadPoolExecutor(2) as pool:
            compiled = pool.map(compile_one, (lowered for lowered, _ in built.values()))
            programs = dict(zip(ways, compiled, strict=True))
        runs = {
            way: functools.partial(run_once, programs[way], built[way][1])
            for way in ways
        }
        times = time_in_turn(runs, 1)
        names = ("width", "mlp", "experts", "picks", "tokens")
        row: dict[str, Any] = {"union": dict(zip(names, union[:5], strict=True))}
        row["milliseconds"] = {way: times[way][0] * 1e3 for way in ways}
        row["spread"] = {way: times[way][1] for way in ways}
        row["tiles"] = taken
        print(row["union"], row["milliseconds"], row["spread"], flush=True)
        record["results"].append(row)
        write_record(args.out, record)


if __name__ == "__main__":
    main(sys.argv[1:])
