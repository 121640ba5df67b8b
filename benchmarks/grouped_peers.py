"""Grouped products at the shapes of `1b-union`'s step, ours beside others'; JSON.

    python benchmarks/grouped_peers.py --minutes 3 --out grouped_peers_h200.json
    python benchmarks/grouped_peers.py --kinds forward --minutes 2
    python benchmarks/grouped_peers.py --tokens 64 --minutes 1     (a CPU: what runs)

Ours, with bfloat16 and with eight-bit operands; the Mosaic GPU kernels that come with
jax (`jax.experimental.pallas.ops.gpu`), each with the tiles below; and one dense
product of equal FLOPs, by cuBLAS: the floor. In eight bits the product alone, of
operands that were rounded before, in several tiles; the rounding of its rows (of
tokens where the product gathers: each is rounded once) and of its weight; and all of
it as a model does it. Each result is held to float64 in a part of it before it is
timed. What fails is named in its row and ends nothing; no program is begun past the
minutes. Rows are of experts that random tokens picked.
"""

from __future__ import annotations

import functools
import importlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uoe_jax.bench.record import arguments, header, write_record
from uoe_jax.bench.timing import median_seconds
from uoe_jax.ops import float8
from uoe_jax.ops.grouped_matmul.nvidia.float8 import (
    forward_products,
    multiply,
    round_operands,
)
from uoe_jax.ops.grouped_matmul.nvidia.launch import products, weight_grads
from uoe_jax.ops.grouped_matmul.nvidia.tiles import Tiles

EXPERTS, PICKS = 16, 8


class Case(NamedTuple):
    """A product: its weight's sides, which product of it, the tiles of jax's kernels.

    These are rows (or inner side), columns, depth, steps in flight, columns a band: the
    three fastest on an H200 of up to 36.
    """

    name: str
    inner: int
    outer: int
    kind: str
    gathers: bool
    tiles: tuple[tuple[int, ...], ...]


WIDE = (128, 192, 64, 4, 2), (128, 192, 64, 4, 1), (64, 192, 64, 6, 2)
TALL = (192, 128, 64, 4, 8), (128, 128, 64, 4, 8)
CASES = (
    Case(
        *("up and gate", 2048, 768, "forward", True),
        ((128, 192, 64, 4, 2), (192, 128, 64, 4, 2), (128, 128, 64, 6, 2)),
    ),
    Case("queries, keys, values", 2048, 384, "forward", True, WIDE),
    Case("down", 384, 2048, "forward", False, (*TALL, (192, 128, 64, 4, 2))),
    Case(
        *("rows of up and gate", 2048, 768, "transposed", False),
        (*TALL, (128, 128, 64, 6, 8)),
    ),
    Case("rows of down", 384, 2048, "transposed", False, WIDE),
    Case(
        *("weights of up and gate", 2048, 768, "weights", False),
        ((128, 192, 64, 4, 2), (128, 192, 64, 4, 1), (128, 128, 64, 4, 2)),
    ),
    Case("weights of queries, keys, values", 2048, 384, "weights", False, WIDE),
    Case(
        *("weights of down", 384, 2048, "weights", False),
        ((128, 128, 64, 4, 8), (128, 128, 64, 6, 1), (128, 128, 64, 4, 2)),
    ),
)
# Of our product in eight bits, beside the one that is chosen.
TILES = (
    Tiles(128, 128, 256, 8, 8, 3),
    Tiles(128, 128, 256, 8, 8, 4),
    Tiles(128, 128, 256, 8, 8, 4, in_turn=1),
    Tiles(256, 128, 128, 16, 8, 4),
    Tiles(128, 128, 128, 16, 4, 3),
    Tiles(128, 128, 128, 8, 4, 3, in_turn=2),
    Tiles(128, 128, 128, 8, 8, 3),
    Tiles(128, 64, 256, 8, 8, 4),
)
LARGEST_ERROR = {"bfloat16": 2**-7, "eight bits": 2**-3}  # of the largest entry


class Operands(NamedTuple):
    """Tokens, their rows, a weight, gradients, and where the experts' rows begin."""

    tokens: jax.Array
    x: jax.Array  # tokens[ids]
    w: jax.Array
    grad: jax.Array
    offsets: jax.Array
    ids: jax.Array


class Program(NamedTuple):
    """What is timed: `run` of what `prepare` makes of the operands, which isn't."""

    name: str
    numbers: str
    run: Callable
    prepare: Callable = lambda given: given
    result: str = "product"  # or a part of the operands: "rows", "weight"
    dense: bool = False


def make_operands(tokens: int, inner: int, outer: int) -> Operands:
    """Return random operands; each token picks PICKS of EXPERTS."""
    rng = np.random.default_rng()
    picked = np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :PICKS].reshape(-1)
    ids = jnp.asarray(np.argsort(picked, stable=True) // PICKS, jnp.int32)
    counts = np.bincount(picked, minlength=EXPERTS)
    offsets = jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32)
    keys = jax.random.split(jax.random.key(rng.integers(2**31)), 3)
    shapes = (tokens, inner), (EXPERTS, inner, outer), (tokens * PICKS, outer)
    draw = lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16)
    x, w, grad = map(draw, keys, shapes)
    return Operands(x, x[ids], w, grad, offsets, ids)


def ours(case: Case) -> Iterator[Program]:
    """Yield our kernels in bfloat16: of packed rows, and of tokens where it gathers."""
    if case.kind == "weights":
        run = lambda a: weight_grads(a.x, a.grad, a.offsets, None, None)
        yield Program("ours", "bfloat16", run)
        return
    transposed = case.kind == "transposed"

    def run(a, gathers=False):
        rows = a.grad if transposed else a.tokens if gathers else a.x
        ids = a.ids if gathers else None
        return products(rows, a.w, a.offsets, ids, transpose=transposed)

    yield Program("ours", "bfloat16", run)
    if case.gathers:
        yield Program("ours, gathers", "bfloat16", functools.partial(run, gathers=True))


def ours_in_eight_bits(case: Case) -> Iterator[Program]:
    """Yield the product as a model has it, its roundings, and it alone by tile."""
    rows = lambda a: a.tokens if case.gathers else a.x
    ids = lambda a: a.ids if case.gathers else None
    eight = functools.partial(Program, numbers="eight bits")
    for scales in ("tensor", "rows"):
        both = functools.partial(round_operands, scales=scales)

        def whole(a, scales=scales):
            return forward_products(rows(a), a.w, a.offsets, ids(a), scales=scales)

        yield eight(f"ours, all of it, {scales}", run=whole)
        of_rows = lambda a, both=both: both(rows(a), a.w)[:2]
        yield eight(f"rounding of rows, {scales}", run=of_rows, result="rows")
        of_weight = lambda a, both=both: both(rows(a), a.w)[2:]
        yield eight(f"rounding of weight, {scales}", run=of_weight, result="weight")

    def prepare(a):
        return round_operands(rows(a), a.w, "rows"), a.offsets, ids(a)

    for tiles in (None, *TILES):
        run = lambda a, tiles=tiles: multiply(*a, dtype=jnp.bfloat16, tiles=tiles)
        name = " ".join(map(str, tiles[:7])) if tiles else "as chosen"
        yield eight(f"ours alone, {name}", run=run, prepare=prepare)


def of_jax(case: Case) -> Iterator[Program]:
    """Yield the kernels that come with jax, tile by tile; rows are packed."""
    weights = case.kind == "weights"
    module = "transposed_ragged_dot_mgpu" if weights else "ragged_dot_mgpu"
    peer = importlib.import_module(f"jax.experimental.pallas.ops.gpu.{module}")
    names = ("block_m", "block_n", "block_k", "max_concurrent_steps", "grid_block_n")
    for tile in case.tiles:
        how = dict(zip(names, tile, strict=True))

        def run(a, how=how):
            how = how | {"group_sizes": jnp.diff(a.offsets)}
            if weights:
                return peer.transposed_ragged_dot(a.x, a.grad, **how)
            back = case.kind == "transposed"
            return peer.ragged_dot(
                a.grad if back else a.x, a.w, transpose_rhs=back, **how
            )

        yield Program(f"jax {' '.join(map(str, tile))}", "bfloat16", run)


def dense(case: Case) -> Iterator[Program]:
    """Yield products of as many FLOPs with one weight."""

    def run(a):
        if case.kind == "weights":
            return a.x.T @ a.grad
        return a.grad @ a.w[0].T if case.kind == "transposed" else a.x @ a.w[0]

    yield Program("dense", "bfloat16", run, dense=True)
    if case.kind != "forward":
        return
    eight = functools.partial(Program, numbers="eight bits", dense=True)
    for scales in ("tensor", "rows"):

        def whole(a, scales=scales):
            with float8.float8_products(scales):
                return float8.matmul(a.x, a.w[0])

        yield eight(f"dense, all of it, {scales}", run=whole)

    def prepare(a):
        made = round_operands(a.x, a.w[:1], "tensor")
        return (
            made.numbers,
            made.row_scales[0],
            made.weights[0],
            made.column_scales[0, 0],
        )

    def alone(a):
        # As XLA finds it: numbers times scales.
        x, w = (
            n.astype(jnp.bfloat16) * s.astype(jnp.bfloat16) for n, s in (a[:2], a[2:])
        )
        return x @ w.T

    yield eight("dense alone", run=alone, prepare=prepare)


def error_of(got: Any, given: Operands, case: Case, program: Program) -> float:
    """Return the largest error of a part of a result, over its largest entry."""
    rng = np.random.default_rng(0)
    wide = lambda a: np.asarray(a.astype(jnp.float32), np.float64)
    offsets = np.asarray(given.offsets)
    if program.result == "rows":
        rows = slice(0, 256)
        want = wide((given.tokens if case.gathers else given.x)[rows])
        found = wide(got[0][rows]) * wide(got[1][rows])[:, None]
    elif program.result == "weight":
        expert = int(rng.integers(EXPERTS))
        want = wide(given.w[expert]).T
        found = wide(got[0][expert]) * wide(got[1][expert])[:, None]
    elif case.kind == "weights":
        columns = rng.integers(0, given.grad.shape[1], 8)
        expert = int(rng.integers(EXPERTS))
        rows = slice(offsets[expert], offsets[expert + 1])
        rows = slice(None) if program.dense else rows
        want = wide(given.x[rows]).T @ wide(given.grad[rows][:, columns])
        found = wide(got[:, columns] if program.dense else got[expert][:, columns])
    else:
        rows = rng.integers(0, given.x.shape[0], 256)
        rows[: 2 * EXPERTS] = np.concatenate([offsets[:-1], offsets[1:] - 1])
        group = np.searchsorted(offsets[1:], rows, side="right")
        group = np.zeros_like(group) if program.dense else group
        left = wide((given.grad if case.kind == "transposed" else given.x)[rows])
        found, want = wide(got[rows]), np.empty((rows.size, got.shape[1]))
        for expert in np.unique(group):
            weight = wide(given.w[int(expert)])
            weight = weight.T if case.kind == "transposed" else weight
            want[group == expert] = left[group == expert] @ weight
    return float(np.abs(found - want).max() / np.abs(want).max())


def compiled(program: Program, given: Operands) -> Any:
    """Return a compiled program and its arguments, or why there is none."""
    try:
        prepared = jax.jit(program.prepare)(given)
        return jax.jit(program.run).lower(prepared).compile(), prepared
    except Exception as error:  # a peer's fault is its row's note
        return error


def note_of(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:160]}"


def time_one(program: Program, made: Any, given: Operands, case: Case) -> dict:
    """Return a program's row: its error and time, or its fault."""
    row: dict[str, Any] = {"name": program.name, "operands": program.numbers}
    try:
        if isinstance(made, Exception):
            raise made
        call, prepared = made
        got = jax.block_until_ready(call(prepared))
        row["error"] = error_of(got, given, case, program)
        del got
        if not row["error"] <= LARGEST_ERROR[program.numbers]:
            return row | {"note": "wrong: not timed"}
        seconds = median_seconds(lambda: call(prepared), jax.block_until_ready, 5)
    except Exception as error:
        return row | {"note": note_of(error)}
    row["ms"] = seconds * 1e3
    if program.result == "product":
        flops = 2 * given.x.shape[0] * case.inner * case.outer
        row["tflops"] = flops / seconds / 1e12
    if program.numbers == "eight bits" and program.dense:
        # Else XLA multiplies in bfloat16, without a word.
        row["in eight bits"] = "$f8" in (call.as_text() or "")
    return row


def programs(case: Case) -> list[Program]:
    eight = ours_in_eight_bits(case) if case.kind == "forward" else ()
    return [*ours(case), *eight, *dense(case), *of_jax(case)]


def run_case(case: Case, tokens: int, end: float) -> dict[str, Any]:
    """Return the rows of one case; compiled by threads, timed one by one."""
    given, tried, rows = (
        make_operands(tokens, case.inner, case.outer),
        programs(case),
        [],
    )
    # In fours, so that time runs out between programs, not among unused ones.
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(tried), 4):
            part = tried[start : start + 4]
            if time.monotonic() > end:
                rows += [{"name": one.name, "note": "no time left"} for one in part]
                continue
            # All of them before one is timed: the device is its own then.
            built = list(pool.map(functools.partial(compiled, given=given), part))
            for program, made in zip(part, built, strict=True):
                rows.append(time_one(program, made, given, case))
                say(rows[-1])
    sides = {"inner": case.inner, "outer": case.outer, "kind": case.kind}
    return {"case": case.name, **sides, "rows": rows}


def say(row: dict[str, Any]) -> None:
    rate = f"  {row['tflops']:6.0f} TFLOP/s" if "tflops" in row else ""
    found = row.get("note") or f"{row['ms']:8.3f} ms{rate}"
    print(f"  {row['name']:32} {found}", flush=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=3 * 8192, help="of a batch")
    parser.add_argument("--minutes", type=float, default=3.0, help="ends after these")
    kinds = sorted({case.kind for case in CASES})
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    given = parser.parse_args()
    os.environ.setdefault("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")
    begin = time.monotonic()
    record = {**header(stated=given.commit), "tokens": given.tokens, "cases": []}
    cases = [case for case in CASES if case.kind in given.kinds]
    counts = [len(programs(case)) for case in cases]
    for number, case in enumerate(cases):
        # Each case has its programs' share of what is left, so that all have rows.
        left = given.minutes * 60 - (time.monotonic() - begin)
        end = time.monotonic() + left * counts[number] / sum(counts[number:])
        print(f"{case.name} [{case.inner}, {case.outer}] {case.kind}", flush=True)
        record["cases"].append(run_case(case, given.tokens, end))
        if given.out:
            write_record(given.out, record)


if __name__ == "__main__":
    main()
