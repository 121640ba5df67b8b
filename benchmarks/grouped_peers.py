"""Grouped products at the shapes of `1b-union`'s step, ours beside others'; JSON.

    python benchmarks/grouped_peers.py --minutes 8 --out grouped_peers_h200.json
    python benchmarks/grouped_peers.py --tokens 64 --minutes 1     (a CPU: what runs)

Ours, with bfloat16 and with eight-bit operands; the Mosaic GPU kernels that come with
jax (`jax.experimental.pallas.ops.gpu`), each with the tiles below; XLA's ragged dot;
and one dense product of equal FLOPs, by cuBLAS: the floor. Each is held to float64 in a
part of its results before it is timed. What fails is named in its row and ends nothing;
no program is begun past the minutes. Rows are of experts that random tokens picked.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uoe_jax.bench.record import arguments, header, write_record
from uoe_jax.bench.timing import median_seconds
from uoe_jax.ops import float8
from uoe_jax.ops.grouped_matmul.nvidia.float8 import forward_products
from uoe_jax.ops.grouped_matmul.nvidia.launch import products, weight_grads

EXPERTS, PICKS = 16, 8
# Inner and outer sides of the weight, and which product of it.
CASES = (
    ("up and gate", 2048, 768, "forward"),
    ("queries, keys, values", 2048, 384, "forward"),
    ("down", 384, 2048, "forward"),
    ("rows of up and gate", 2048, 768, "transposed"),
    ("rows of down", 384, 2048, "transposed"),
    ("weights of up and gate", 2048, 768, "weights"),
    ("weights of queries, keys, values", 2048, 384, "weights"),
    ("weights of down", 384, 2048, "weights"),
)
# Of jax's kernels: rows (or inner side), columns, depth, steps in flight, columns a
# band. Those first that are likeliest to be fast.
TILES = tuple(
    (*sides, deep, steps, band)
    for (sides, deep), steps, band in itertools.product(
        (((128, 128), 64), ((128, 192), 64), ((192, 128), 64), ((64, 192), 64)),
        (4, 6, 2),
        (1, 2, 8),
    )
)
LARGEST_ERROR = {"bfloat16": 2**-7, "eight bits": 2**-3}  # of the largest entry


@dataclass(frozen=True)
class Operands:
    """Rows, a weight, gradients, and where the experts' rows begin."""

    x: jax.Array
    w: jax.Array
    grad: jax.Array
    offsets: jax.Array

    @property
    def sizes(self) -> jax.Array:
        """Rows of each expert."""
        return jnp.diff(self.offsets)


def make_operands(tokens: int, inner: int, outer: int) -> Operands:
    """Return random operands; each token picks PICKS of EXPERTS."""
    rng = np.random.default_rng()
    picked = np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :PICKS]
    counts = np.bincount(picked.reshape(-1), minlength=EXPERTS)
    offsets = jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32)
    keys = jax.random.split(jax.random.key(rng.integers(2**31)), 3)
    shapes = (tokens * PICKS, inner), (EXPERTS, inner, outer), (tokens * PICKS, outer)
    draw = lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16)
    return Operands(*map(draw, keys, shapes), offsets)


def ours(kind: str) -> Iterator[tuple[str, str, Callable]]:
    """Yield our kernels: a name, the operands' type, a function of the arrays."""
    if kind == "weights":
        run = lambda x, w, grad, offsets: weight_grads(x, grad, offsets, None, None)
        yield "ours", "bfloat16", run
        return
    transposed = kind == "transposed"

    def run(x, w, grad, offsets):
        rows = grad if transposed else x
        return products(rows, w, offsets, None, transpose=transposed)

    yield "ours", "bfloat16", run
    if not transposed:
        for scales in ("tensor", "rows"):

            def rounded(x, w, grad, offsets, scales=scales):
                return forward_products(x, w, offsets, None, scales=scales)

            yield f"ours, rounded, {scales}", "eight bits", rounded


def of_jax(kind: str, columns: int) -> Iterator[tuple[str, str, Callable]]:
    """Yield the kernels that come with jax, tile by tile, where columns fit."""
    module = "transposed_ragged_dot_mgpu" if kind == "weights" else "ragged_dot_mgpu"
    peer = importlib.import_module(f"jax.experimental.pallas.ops.gpu.{module}")
    names = ("block_m", "block_n", "block_k", "max_concurrent_steps", "grid_block_n")
    for tile in TILES:
        how = dict(zip(names, tile, strict=True))
        if columns % (how["block_n"] * how["grid_block_n"]):
            continue
        if kind == "weights":
            if how["block_m"] == 192:
                continue

            def run(x, w, grad, offsets, how=how):
                sizes = jnp.diff(offsets)
                return peer.transposed_ragged_dot(x, grad, group_sizes=sizes, **how)

        else:

            def run(x, w, grad, offsets, how=how):
                back = kind == "transposed"
                options = {"group_sizes": jnp.diff(offsets), "transpose_rhs": back}
                return peer.ragged_dot(grad if back else x, w, **options, **how)

        yield f"jax {' '.join(map(str, tile))}", "bfloat16", run


def of_xla(kind: str) -> Iterator[tuple[str, str, Callable]]:
    """Yield XLA's ragged dot, and dense products of as many FLOPs with one weight."""

    def ragged(x, w, grad, offsets):
        sizes = jnp.diff(offsets)
        if kind == "weights":
            numbers = jax.lax.RaggedDotDimensionNumbers(
                dot_dimension_numbers=(((0,), (0,)), ((), ())),
                lhs_ragged_dimensions=[0],
                rhs_group_dimensions=[],
            )
            return jax.lax.ragged_dot_general(x, grad, sizes, numbers)
        if kind == "transposed":
            return jax.lax.ragged_dot(grad, jnp.swapaxes(w, 1, 2), sizes)
        return jax.lax.ragged_dot(x, w, sizes)

    def dense(x, w, grad, offsets):
        if kind == "weights":
            return x.T @ grad
        return grad @ w[0].T if kind == "transposed" else x @ w[0]

    yield "dense", "bfloat16", dense
    if kind == "forward":
        for scales in ("tensor", "rows"):

            def rounded(x, w, grad, offsets, scales=scales):
                with float8.float8_products(scales):
                    return float8.matmul(x, w[0])

            yield f"dense, rounded, {scales}", "eight bits", rounded
    yield "XLA's ragged dot", "bfloat16", ragged


def error_of(got: jax.Array, given: Operands, kind: str, dense: bool) -> float:
    """Return the largest error of a part of a result, over its largest entry."""
    rng = np.random.default_rng(0)
    wide = lambda a: np.asarray(a.astype(jnp.float32), np.float64)
    offsets = np.asarray(given.offsets)
    if kind == "weights":
        columns = rng.integers(0, given.grad.shape[1], 8)
        expert = int(rng.integers(EXPERTS))
        rows = slice(None) if dense else slice(offsets[expert], offsets[expert + 1])
        want = wide(given.x[rows]).T @ wide(given.grad[rows][:, columns])
        found = wide(got[:, columns] if dense else got[expert][:, columns])
    else:
        rows = rng.integers(0, given.x.shape[0], 256)
        rows[: 2 * EXPERTS] = np.concatenate([offsets[:-1], offsets[1:] - 1])
        group = np.searchsorted(offsets[1:], rows, side="right")
        group = np.zeros_like(group) if dense else group
        left = wide((given.grad if kind == "transposed" else given.x)[rows])
        found, want = wide(got[rows]), np.empty((rows.size, got.shape[1]))
        for expert in np.unique(group):
            weight = wide(given.w[int(expert)])
            weight = weight.T if kind == "transposed" else weight
            want[group == expert] = left[group == expert] @ weight
    return float(np.abs(found - want).max() / np.abs(want).max())


def compiled(run: Callable, given: Operands) -> Any:
    """Return a compiled program, or why there is none."""
    try:
        arrays = given.x, given.w, given.grad, given.offsets
        return jax.jit(run).lower(*arrays).compile()
    except Exception as error:  # a peer's fault is its row's note
        return error


def note_of(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:160]}"


def time_one(name: str, numbers: str, program: Any, given: Operands, kind: str) -> dict:
    """Return a program's row: its error and time, or its fault."""
    row: dict[str, Any] = {"name": name, "operands": numbers}
    try:
        if isinstance(program, Exception):
            raise program
        arrays = given.x, given.w, given.grad, given.offsets
        got = jax.block_until_ready(program(*arrays))
        dense = name.startswith("dense")
        row["error"] = error_of(got, given, kind, dense)
        del got
        if not row["error"] <= LARGEST_ERROR[numbers]:
            return row | {"note": "wrong: not timed"}
        run = lambda: program(*arrays)
        seconds = median_seconds(run, jax.block_until_ready, 5)
    except Exception as error:
        return row | {"note": note_of(error)}
    rows, (_, inner, outer) = given.x.shape[0], given.w.shape
    row["ms"] = seconds * 1e3
    row["tflops"] = 2 * rows * inner * outer / seconds / 1e12
    if numbers == "eight bits" and dense:
        # Else XLA multiplies in bfloat16, without a word.
        row["in eight bits"] = "$f8" in (program.as_text() or "")
    return row


def run_case(case: tuple, tokens: int, end: float) -> dict[str, Any]:
    """Return the rows of one case; compiled by threads, timed one by one."""
    name, inner, outer, kind = case
    given = make_operands(tokens, inner, outer)
    columns = inner if kind == "transposed" else outer
    tried = [*ours(kind), *of_xla(kind), *of_jax(kind, columns)]
    rows = []
    # In fours, so that time runs out between programs, not among unused ones.
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(tried), 4):
            part = tried[start : start + 4]
            if time.monotonic() > end:
                rows += [{"name": one[0], "note": "no time left"} for one in part]
                continue
            make = functools.partial(compiled, given=given)
            built = pool.map(make, [run for _, _, run in part])
            for (label, numbers, _), program in zip(part, built, strict=True):
                rows.append(time_one(label, numbers, program, given, kind))
                say(rows[-1])
    return {"case": name, "inner": inner, "outer": outer, "kind": kind, "rows": rows}


def say(row: dict[str, Any]) -> None:
    found = row.get("note") or f"{row['ms']:8.3f} ms  {row['tflops']:6.0f} TFLOP/s"
    print(f"  {row['name']:28} {found}", flush=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=3 * 8192, help="of a batch")
    parser.add_argument("--minutes", type=float, default=8.0, help="ends after these")
    given = parser.parse_args()
    os.environ.setdefault("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")
    begin = time.monotonic()
    record = {**header(stated=given.commit), "tokens": given.tokens, "cases": []}
    for number, case in enumerate(CASES):
        # Each case has an equal share of what is left, so that all have rows.
        left = given.minutes * 60 - (time.monotonic() - begin)
        end = time.monotonic() + left / (len(CASES) - number)
        print(f"{case[0]} [{case[1]}, {case[2]}] {case[3]}", flush=True)
        record["cases"].append(run_case(case, given.tokens, end))
        if given.out:
            write_record(given.out, record)


if __name__ == "__main__":
    main()
