"""Triton attention kernels: compiled for GPUs that aren't here, tiles timed on one.

    python benchmarks/triton_attention.py compile \
        --out benchmarks/results/triton_attention_compile.json
    python benchmarks/triton_attention.py compile --only "causal H128" --capability 89
    python benchmarks/triton_attention.py tiles --out tiles.json

`compile` needs triton, no GPU: every kernel is compiled as a call on such a device
would launch it, with the tiles it takes there, through triton and its own ptxas, which
tells registers and spilled bytes. `tiles` changes one kernel's tile at a time, the
others keep their defaults: forward tiles are timed in the forward pass, the rest in
both passes. Its lists belong under "tiles" in `uoe_jax/ops/tuning/<device>.json`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

if "compile" in sys.argv:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from uoe_jax.bench.attention import draw
from uoe_jax.bench.record import arguments, command_line, header, write_record
from uoe_jax.bench.timing import both_passes, median_seconds
from uoe_jax.files import format_json
from uoe_jax.ops import nvidia
from uoe_jax.ops.segment_attention.call import Call, Mask
from uoe_jax.ops.segment_attention.nvidia import triton as attention
from uoe_jax.ops.segment_attention.nvidia.triton import Tiles

CAPABILITIES = (80, 86, 89, 90)
ROWS, SEGMENTS = 16384, 8
TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32"}


@dataclass(frozen=True)
class Case:
    """A call whose kernels differ from the others'."""

    width: int
    groups: int = 1
    causal: bool = True
    window: int | None = None
    bounds: bool = False
    dtype: str = "bfloat16"


CASES = {
    "causal H16": Case(16),
    "causal H32": Case(32),
    "causal H64": Case(64),
    "causal H128": Case(128),
    "causal H256": Case(256),
    "full H64, 4 query heads, float16": Case(64, 4, causal=False, dtype="float16"),
    "full H128, 4 query heads": Case(128, 4, causal=False),
    "window 1024 H128": Case(128, window=1024),
    "causal H64, documents": Case(64, bounds=True),
    "full H32, documents": Case(32, causal=False, bounds=True),
    "causal H128, documents": Case(128, bounds=True),
}
SETS = 4  # of inputs, so that no call finds its own in the cache
TIMED = [  # causal, segments, rows of each, H
    (True, 16, 2048, 64),
    (True, 8, 8192, 64),
    (True, 16, 2048, 128),
    (True, 8, 8192, 128),
    (False, 8, 4096, 128),
]
QUERY_TILES = [
    *(Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2)),
    *(Tiles(128, 128, 8, 2), Tiles(128, 32, 4, 3), Tiles(128, 32, 8, 3)),
    Tiles(64, 64, 4, 3),
]
CANDIDATES = {
    "forward": QUERY_TILES,
    "query_gradient": QUERY_TILES,
    "key_gradients": [
        *(Tiles(128, 32, 8, 3), Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2)),
        *(Tiles(64, 64, 8, 2), Tiles(64, 64, 4, 3), Tiles(64, 32, 4, 3)),
    ],
}


def launches(case: Case, capability: int) -> list[dict[str, Any]]:
    """What value and gradients of a call launch, found by tracing it."""
    found = []

    def launch(kernel, *args, out_shape, num_warps, num_stages, grid, **constants):
        dtypes = [a.dtype for a in args] + [jnp.dtype(d) for _, d in out_shape]
        options = {"num_warps": num_warps, "num_stages": num_stages}
        found.append({"kernel": kernel, "dtypes": dtypes, "options": options})
        found[-1]["constants"] = constants
        return [jnp.zeros(*each) for each in out_shape]

    def value_and_grads(q, k, v, offsets, *bounds):
        more = Mask(case.causal, case.window), case.width**-0.5, bounds or None
        attend = lambda *qkv: attention.segment_attention(Call(*qkv, offsets, *more))
        out, vjp = jax.vjp(attend, q, k, v)
        return vjp(out)

    shape = jax.ShapeDtypeStruct
    key = shape((ROWS, case.width), case.dtype)
    query = shape((ROWS, case.groups, case.width), case.dtype)
    bounds = [shape((ROWS,), jnp.int32)] * (2 if case.bounds else 0)
    memory = nvidia.SHARED_MEMORY.get(capability / 10, nvidia.LEAST_SHARED_MEMORY)
    with (
        mock.patch.object(nvidia, "launch", launch),
        mock.patch.object(nvidia, "shared_memory", lambda: memory),
        nvidia.interpreted(launch),  # or it would ask for a device
    ):
        offsets = shape((SEGMENTS + 1,), jnp.int32)
        jax.eval_shape(value_and_grads, query, key, key, offsets, *bounds)
    return found


def compile_launch(
    kernel: Any, dtypes: list, options: dict, constants: dict, capability: int
) -> dict[str, Any]:
    """What a kernel takes of a multiprocessor, a program at a time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = iter(dtypes)
    signature = {
        name: "constexpr" if name in constants else f"*{TYPES[next(types).name]}"
        for name in kernel.arg_names
    }
    aligned = [["tt.divisibility", 16]]  # as jax-triton tells of every array
    arrays = [i for i, name in enumerate(signature) if name not in constants]
    attrs = {(i,): aligned for i in arrays}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attrs)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options)
    registers, spilled = assembled(compiled.asm["ptx"], capability)
    return {
        "rows": constants["ROWS"],
        "block": constants["BLOCK"],
        **options,
        "shared_bytes": compiled.metadata.shared,
        "registers": registers,
        "spilled_bytes": spilled,
    }


def assembled(ptx: str, capability: int) -> tuple[int, int]:
    """Registers of a thread, and bytes that it stores for want of more."""
    import triton

    arch = f"sm_{capability}{'a' if capability >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={arch}"]
        command += [str(path), "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    spilled = re.search(r"(\d+) bytes spill stores", done.stderr)
    registers = re.search(r"Used (\d+) registers", done.stderr)
    assert spilled and registers, done.stderr
    return int(registers[1]), int(spilled[1])


def compile_all(args: argparse.Namespace) -> None:
    """Compile the cases for each capability."""
    record: dict[str, Any] = {
        "triton": importlib.metadata.version("triton"),
        "command": command_line(),
        "note": "compiled without a GPU; nothing was run on one",
        "cases": {},
    }
    for name in (name for name in CASES if args.only in name):
        case = record["cases"][name] = {}
        for capability in args.capability or CAPABILITIES:
            kernels = case[f"sm_{capability}"] = {}
            for call in launches(CASES[name], capability):
                label = call["kernel"].__name__
                kernels[label] = compile_launch(**call, capability=capability)
                print(name, f"sm_{capability}", label, kernels[label], flush=True)
        write_record(args.out, record)


def fits(kernel: str, width: int, tiles: Tiles) -> bool:
    memory = nvidia.shared_memory()
    return attention.shared_bytes(kernel, width, 2, tiles) <= memory


def time_tile(kernel: str, tiles: Tiles, case: tuple, rounds: int) -> dict[str, Any]:
    """One measurement, or why there is none."""
    causal, count, rows, width = case
    choose = attention.choose_tiles
    mine = lambda name, shape: tiles if name == kernel else choose(name, shape)
    offsets = jnp.arange(count + 1, dtype=jnp.int32) * rows
    key, query = (count * rows, width), (count * rows, 1, width)
    attend = lambda q, k, v: attention.segment_attention(
        Call(q, k, v, offsets, Mask(causal), width**-0.5)
    )
    shapes = [query, key, key] + ([] if kernel == "forward" else [query])
    function = attend if kernel == "forward" else both_passes(attend)
    sets = [draw("bfloat16", *shapes) for _ in range(SETS)]
    with mock.patch.object(attention, "choose_tiles", mine):
        try:
            program = jax.jit(lambda sets: [function(*one) for one in sets])
            run = lambda: program(sets)
            seconds = median_seconds(run, jax.block_until_ready, rounds) / SETS
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            return {"tile": tiles._asdict(), "error": str(error)[:200]}
    return {"tile": tiles._asdict(), "ms": seconds * 1e3}


def time_tiles(args: argparse.Namespace) -> None:
    """Time every kernel's tiles that fit; the fastest are the tuning entries."""
    nvidia.require(jnp.bfloat16)
    record: dict[str, Any] = {**header(stated=args.commit), "tiles": {}}
    for case in (c for c in TIMED if args.width in (None, c[3])):
        causal, count, rows, width = case
        shape = {"rows": count * rows, "groups": 1, "width": width}
        shape |= {"causal": causal, "dtype": "bfloat16"}
        for kernel, candidates in CANDIDATES.items():
            fit = [tiles for tiles in candidates if fits(kernel, width, tiles)]
            lines = [time_tile(kernel, tiles, case, args.rounds) for tiles in fit]
            for line in lines:
                print(shape, kernel, line, flush=True)
            timed = [line for line in lines if "ms" in line]
            if timed:
                best = min(timed, key=lambda line: line["ms"])
                entries = record["tiles"].setdefault(f"segment_attention_{kernel}", [])
                entries.append({"shape": shape, **best})
            write_record(args.out, record)
    print(format_json(record["tiles"], indent=1))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("what", choices=("compile", "tiles"))
    parser.add_argument("--only", default="", help="compile cases whose name holds it")
    parser.add_argument("--capability", type=int, nargs="+", choices=CAPABILITIES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, help="of the heads; default: 64 and 128")
    args = parser.parse_args()
    try:
        (compile_all if args.what == "compile" else time_tiles)(args)
    except NotImplementedError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
