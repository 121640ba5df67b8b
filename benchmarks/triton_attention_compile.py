"""Compile the Triton attention kernels for GPUs that aren't here; write JSON.

    python benchmarks/triton_attention_compile.py \
        --out benchmarks/results/triton_attention_compile.json
    python benchmarks/triton_attention_compile.py --only "causal H128" --capability 89

Needs triton, no GPU. Every kernel is compiled as a call on such a device would launch
it: with the tiles it takes there, through triton and its own ptxas, which tells
registers and spilled bytes. Nothing here was run on a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from uoe_jax.files import format_json
from uoe_jax.ops import nvidia
from uoe_jax.ops.segment_attention.call import Call, Mask
from uoe_jax.ops.segment_attention.nvidia import triton as attention

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
    types = iter(dtypes)
    signature = {
        name: "constexpr" if name in constants else f"*{TYPES[next(types).name]}"
        for name in kernel.arg_names
    }
    aligned = [["tt.divisibility", 16]]  # as jax-triton tells of every array
    arrays = [i for i, name in enumerate(signature) if name not in constants]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs=constants,
        attrs={(i,): aligned for i in arrays},
    )
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="file to write")
    parser.add_argument("--only", default="", help="compile cases whose name holds it")
    parser.add_argument("--capability", type=int, choices=CAPABILITIES)
    args = parser.parse_args()
    cases: dict[str, Any] = {}
    command = "python benchmarks/triton_attention_compile.py"
    record = {
        "triton": importlib.metadata.version("triton"),
        "command": f"{command} --out {args.out}",
        "note": "compiled without a GPU; nothing was run on one",
        "cases": cases,
    }
    capabilities = [args.capability] if args.capability else CAPABILITIES
    for name in (name for name in CASES if args.only in name):
        cases[name] = {}
        for capability in capabilities:
            kernels = cases[name][f"sm_{capability}"] = {}
            for call in launches(CASES[name], capability):
                label = call["kernel"].__name__
                kernels[label] = compile_launch(**call, capability=capability)
                print(name, f"sm_{capability}", label, kernels[label], flush=True)
    if args.out:
        Path(args.out).write_text(format_json(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
