"""Compile the TPU kernels and training steps for TPUs that aren't here; write JSON.

    python benchmarks/aot_tpu.py --out benchmarks/results/aot_tpu.json
    python benchmarks/aot_tpu.py --generations v5e --only attention

Needs libtpu (`pip install 'uoe_jax[tpu]'`), no TPU. Seconds are estimates: the
compiler's roofline for whole programs, its instruction schedule for the attention
kernels (see tpu_schedule.py for what that leaves out). Nothing here was run on a TPU.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import aot_steps
import jax
import jax.numpy as jnp
import numpy as np
import tpu_schedule

from uoe_jax.bench.record import arguments, command_line, read_record, write_record
from uoe_jax.ops import Packing, tpu
from uoe_jax.ops.dense_attention import splash
from uoe_jax.ops.dense_attention.call import Call as DenseCall
from uoe_jax.ops.grouped_matmul.tpu import mosaic as grouped
from uoe_jax.ops.grouped_matmul.tpu.schedule import computed_rows
from uoe_jax.ops.segment_attention.call import Call, Mask
from uoe_jax.ops.segment_attention.tpu import mosaic as attention
from uoe_jax.ops.segment_attention.tpu.schedule import (
    computed_pairs,
    needed_pairs,
    visited,
)
from uoe_jax.plan import aot

BF16 = jnp.bfloat16


@dataclass(frozen=True)
class Attention:
    """One call: each of `heads` key heads sees `kept` of the tokens of each sample."""

    batch: int
    length: int
    heads: int
    width: int
    kept: float = 1.0
    groups: int = 1
    causal: bool = True
    window: int | None = None

    def offsets(self) -> np.ndarray:
        """Segment offsets as a random router gives them."""
        count = self.batch * self.heads
        sizes = np.full(count, self.length)
        if self.kept < 1:
            rng = np.random.default_rng(0)
            sizes = rng.binomial(self.length, self.kept, size=count)
            # A packing has a fixed number of rows.
            sizes[-1] += round(count * self.length * self.kept) - sizes.sum()
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)


ATTENTION = {
    "dense 2x8192 N16 H128": Attention(2, 8192, 16, 128),
    "union 8 of 16, 2x8192 H128 (1b)": Attention(2, 8192, 16, 128, kept=0.5),
    "union 3 of 6, 8x2048 H128 (small)": Attention(8, 2048, 6, 128, kept=0.5),
    "union 4 of 8, 1x8192 G4 H128 (7b)": Attention(1, 8192, 8, 128, 0.5, groups=4),
    "union 4 of 8, 16x256 H16 (tiny)": Attention(16, 256, 8, 16, kept=0.5),
    "union 4 of 8, 2x4096 H256": Attention(2, 4096, 8, 256, kept=0.5),
    "full union 4 of 8, 4x4096 H64": Attention(4, 4096, 8, 64, 0.5, causal=False),
    "window 1024, 2x8192 N16 H128": Attention(2, 8192, 16, 128, window=1024),
}
DENSE, UNION = list(ATTENTION)[:2]  # the same shape, with and without selection
SPLASH = "dense 2x8192 N16 H128, splash"


@dataclass(frozen=True)
class Grouped:
    """One gather-project or project-scatter of a union layer."""

    batch: int
    length: int
    top_k: int
    experts: int
    depth: int
    width: int
    scatter: bool = False


GROUPED = {
    "1b q k v, gather": Grouped(2, 8192, 8, 16, 2048, 384),
    "1b output, scatter": Grouped(2, 8192, 8, 16, 128, 2048, True),
    "1b mlp in, gather": Grouped(2, 8192, 8, 16, 2048, 768),
    "1b mlp out, scatter": Grouped(2, 8192, 8, 16, 384, 2048, True),
    "small mlp in, gather": Grouped(8, 2048, 3, 6, 768, 512),
    "7b mlp in, gather": Grouped(1, 8192, 4, 8, 4096, 3584),
    "7b mlp out, scatter": Grouped(1, 8192, 4, 8, 1792, 4096, True),
}


def shape(*sides: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sides, dtype)


def compile_attention(case: Attention, name: str, dumps: Path) -> dict[str, Any]:
    """Compile value and gradients; return figures of the program and its kernels."""
    mesh = aot.topology_mesh(aot.TOPOLOGIES[name])
    offsets = case.offsets()
    num_rows, mask = int(offsets[-1]), Mask(case.causal, case.window)
    how = mask._asdict()

    def objective(q, k, v, offsets):
        call = Call(q, k, v, offsets, mask, case.width**-0.5)
        out = attention.segment_attention(call)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    rows, ends = shape(num_rows, case.width), shape(len(offsets), dtype=jnp.int32)
    args = (shape(num_rows, case.groups, case.width), rows, rows, ends)
    tpu_schedule.clear_dump(dumps)
    result = compiled(jax.grad(objective, (0, 1, 2)), args, name, mesh)
    target = tpu.Target(mesh.devices.flat[0].device_kind)
    options = attention.make_options(
        target, args[0].shape, BF16, len(offsets) - 1, mask=mask, scale=1.0
    )
    result |= {"vmem_bytes": options.vmem, "kernels": {}}
    for kernel in ("forward", "dq", "dkv"):
        call = (case, options, offsets, kernel, dumps, how)
        result["kernels"][kernel] = kernel_figures(*call)
    total = sum(kernel["seconds"] for kernel in result["kernels"].values())
    return result | {"schedule_seconds": total}


def kernel_figures(case, options, offsets, kernel, dumps, how) -> dict[str, Any]:
    """Return tiles, work and scheduled cycles of one of the three kernels."""
    keys = kernel == "dkv"
    rows = options.key_rows if keys else options.rows
    chunk = options.key_chunk if keys else options.chunk
    heads = case.groups if keys else 1
    stacked = 1 if keys else case.groups
    num_rows = int(offsets[-1])
    how = how | {"seen_by": keys}
    plan = (jnp.asarray(offsets), num_rows, rows, chunk)
    dump = tpu_schedule.find_dump(dumps, f"segment_attention_{kernel}")
    schedule = tpu_schedule.read_stream(dump)
    blocks = visited(*plan, groups=stacked, **how)
    products = {"forward": 2, "dq": 3, "dkv": 4}[kernel]
    generation = options.target.generation
    pair = stacked * case.width * products / generation.macs_per_cycle
    sizes = (rows, chunk, pair)
    cycles = tpu_schedule.stream_cycles(schedule, blocks, *sizes, heads=heads)
    need = needed_pairs(plan[0], num_rows, **how)
    floor, work = need * heads * pair, computed_pairs(*plan, groups=stacked, **how)
    return {
        "rows": rows,
        "chunk": chunk,
        "work_over_floor": round(work / need, 4),
        "bundles": schedule.as_dict(),
        "cycles": cycles,
        "seconds": cycles / generation.clock_hz,
        "matrix_unit_use": round(floor / cycles, 3),
    }


def compile_grouped(case: Grouped, name: str, dumps: Path) -> dict[str, Any]:
    """Compile value and gradients of one side of a union layer."""
    del dumps
    mesh = aot.topology_mesh(aot.TOPOLOGIES[name])
    operation = grouped.project_scatter if case.scatter else grouped.gather_project

    def objective(x, w, packing):
        out = operation(x, w, packing)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    tokens = case.batch * case.length
    num_rows = tokens * case.top_k
    packing = Packing(
        token_ids=shape(num_rows, dtype=jnp.int32),
        row_ids=shape(tokens, case.top_k, dtype=jnp.int32),
        segment_offsets=shape(case.experts * case.batch + 1, dtype=jnp.int32),
        group_offsets=shape(case.experts + 1, dtype=jnp.int32),
    )
    x = shape(num_rows if case.scatter else tokens, case.depth)
    args = (x, shape(case.experts, case.depth, case.width), packing)
    result = compiled(jax.grad(objective, (0, 1)), args, name, mesh)
    target = tpu.Target(mesh.devices.flat[0].device_kind)
    return result | grouped_tiles(case, target)


def grouped_tiles(case: Grouped, target: tpu.Target) -> dict[str, Any]:
    """Return the tiles of the three kernels, their VMEM, and work over the floor."""
    num_rows = case.batch * case.length * case.top_k
    w = shape(case.experts, case.depth, case.width)
    kinds = grouped.SUMMED if case.scatter else grouped.PICKED
    if not grouped.fits(target, num_rows, w, kinds):
        kinds = grouped.PLAIN
    shares = [1 / case.experts] * case.experts
    sizes = np.random.default_rng(0).multinomial(num_rows, shares)
    offsets = jnp.asarray(np.concatenate([[0], np.cumsum(sizes)]), jnp.int32)
    tiles, vmem, work = {}, 0, 0.0
    for kernel, rows in zip(("", "_dx", "_dw"), kinds, strict=True):
        sides = (case.depth, case.width)
        op = "grouped_matmul_dw" if kernel == "_dw" else "grouped_matmul"
        sides = sides[::-1] if kernel == "_dx" else sides
        chosen = grouped.choose_tiles(target, op, num_rows, *sides, BF16, rows)
        tiles[f"grouped_matmul{kernel}"] = [chosen.rows, chosen.inner, chosen.outer]
        vmem = max(vmem, chosen.vmem)
        work = max(work, computed_rows(offsets, num_rows, chosen.rows) / num_rows)
    return {
        "rows_are": list(kinds),
        "tiles": tiles,
        "vmem_bytes": vmem,
        "work_over_floor": round(work, 4),
        "row_bytes": num_rows * max(case.depth, case.width) * 2,
    }


def compiled(function, args, name, mesh) -> dict[str, Any]:
    """Compile; return the compiler's figures, or its refusal."""
    start = time.perf_counter()
    figures = aot.compile_for(function, *args, topology=aot.TOPOLOGIES[name], mesh=mesh)
    return {"compile_seconds": round(time.perf_counter() - start, 1)} | {
        key: value for key, value in figures.as_dict().items() if key != "topology"
    }


def compile_splash(name: str, dumps: Path) -> dict[str, Any]:
    """Compile jax's own dense kernel in the shape of DENSE; return its figures."""
    case = ATTENTION[DENSE]
    mesh = aot.topology_mesh(aot.TOPOLOGIES[name])

    def objective(q, k, v):
        call = DenseCall(q, k, v, Mask(causal=True), None, case.width**-0.5)
        out = splash.dense_attention(call)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    sides = shape(case.batch, case.length, case.heads, case.width)
    tpu_schedule.clear_dump(dumps)
    result = compiled(jax.grad(objective, (0, 1, 2)), (sides,) * 3, name, mesh)
    block = splash.block_side(tpu.Target(mesh.devices.flat[0].device_kind), sides)
    tiles = case.length // block
    steps = case.batch * case.heads * tiles * (tiles + 1) // 2
    generation = tpu.Target(mesh.devices.flat[0].device_kind).generation
    cycles = {}
    for kernel, products in (("fwd", 2), ("dq", 3), ("dkv", 4)):
        path = tpu_schedule.find_dump(dumps, f"splash_mha_{kernel}")
        least = block**2 * case.width * products / generation.macs_per_cycle
        cycles[kernel] = tpu_schedule.grid_cycles(path, steps, least)
    seconds = sum(cycles.values()) / generation.clock_hz
    return result | {"block": block, "cycles": cycles, "schedule_seconds": seconds}


def add_ratios(figures: dict[str, Any]) -> dict[str, float]:
    """Return the union's scheduled time over each dense kernel's, by kernel."""
    union = figures.get(UNION)
    return {
        name: round(union["schedule_seconds"] / figures[name]["schedule_seconds"], 4)
        for name in (DENSE, SPLASH)
        if union and name in figures
    }


def run_suite(suite: str, name: str, match: str, record: dict, save: Any) -> None:
    """Compile one suite for one generation, saving after every case."""
    suites = {
        "attention": (ATTENTION, compile_attention),
        "grouped": (GROUPED, compile_grouped),
        "steps": (aot_steps.STEPS, aot_steps.compile_step),
    }
    cases, run = suites[suite]
    figures = record.setdefault(name, {}).setdefault(suite, {})
    with tempfile.TemporaryDirectory() as folder:
        dumps = Path(folder)
        if suite == "attention":
            # Read by libtpu when the first topology is asked for.
            os.environ["LIBTPU_INIT_ARGS"] = (
                f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
                "--xla_jf_dump_llo_pass_label_regex=final_bundles"
            )
        work = {title: partial(run, case) for title, case in cases.items()}
        if suite == "attention":
            work[SPLASH] = compile_splash
        for title, compile_case in work.items():
            other = getattr(cases.get(title), "only", None) not in (None, name)
            if match not in title or other:
                continue
            figures[title] = compile_case(name, dumps)
            print(name, title, flush=True)
            tpu_schedule.clear_dump(dumps)
            if suite == "attention":
                record[name]["union_over_dense"] = add_ratios(figures)
            save()


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(out=Path("aot_tpu.json"))
    parser.add_argument("--generations", nargs="+", default=list(aot.TOPOLOGIES))
    parser.add_argument("--only", nargs="+", default=["attention", "grouped", "steps"])
    parser.add_argument("--match", default="", help="part of a case's name")
    options = parser.parse_args()
    pairs = [(name, suite) for name in options.generations for suite in options.only]
    if len(pairs) > 1:
        # A process each: libtpu reads its options once, and keeps what it compiled.
        for name, suite in pairs:
            one = ["--generations", name, "--only", suite, "--match", options.match]
            command = [sys.executable, __file__, *one, "--out", str(options.out)]
            subprocess.run(command, check=True)
        return
    record = read_record(options.out) | {"command": command_line()}
    version = importlib.metadata.version
    record["versions"] = {name: version(name) for name in ("jax", "libtpu")}
    ((name, suite),) = pairs
    save = lambda: write_record(options.out, record)
    run_suite(suite, name, options.match, record, save)


if __name__ == "__main__":
    main()
