"""Compare every legal layout of eight simulated devices with one device.

    JAX_PLATFORMS=cpu python benchmarks/layout_matrix.py [--kinds union] [--out FILE]

For a dense model, a mixture and a union of one layer, float32: the largest difference
of the loss and of any gradient, with the layout's choices in turn. Layouts that FILE
holds already aren't computed again.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import jax
import numpy as np
from flax import nnx

from uoe_jax.bench.record import arguments, header, read_record, write_record
from uoe_jax.plan.layouts import describe_sizes, verdicts

TOLERANCE = 1e-5
# Nearly all of the time is compilation; code that runs once needn't be optimised.
FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    "--xla_cpu_parallel_codegen_split_count=1"
)
ROUTED = {"dispatch": "all_to_all", "experts": "round_robin"}
# In turn, where the mesh has the axes; the rest has no choice to make.
CHOICES: tuple[dict[str, str], ...] = (
    {},
    {"tensor_reduce": "reduce_scatter", "sequence_attention": "gather"},
    ROUTED,
    {"tensor_reduce": "reduce_scatter", **ROUTED},
)


def largest(a: Any, b: Any = None) -> float:
    """Return the largest difference of two trees, or the largest size in one."""
    ours = jax.tree.leaves(a)
    theirs = [0.0] * len(ours) if b is None else jax.tree.leaves(b)
    pairs = zip(ours, theirs, strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)


def compare(kind: str, sizes: dict[str, int], layout: dict[str, str]) -> dict[str, Any]:
    """Return a layout's differences from one device."""
    from tests.partition.tiny_layouts import compute, make_config, one_device

    start = time.perf_counter()
    got, expected = compute(make_config(kind, sizes, layout)), one_device(kind)
    return {
        "kind": kind,
        "mesh": sizes,
        "layout": layout,
        "gradient_difference": largest(expected[0], got[0]),
        "gradient_size": largest(expected[0]),
        "loss_difference": largest(expected[1:], got[1:]),
        "seconds": round(time.perf_counter() - start, 1),
    }


def cases(kinds: list[str]) -> list[tuple[str, dict[str, int], dict[str, str]]]:
    """Return every legal layout of eight devices, each with one set of choices."""
    from tests.partition.tiny_layouts import make_config

    found = []
    for kind in kinds:
        turn = 0
        for verdict in verdicts(make_config(kind), 8):
            if verdict.problems:
                continue
            sizes, layout = verdict.sizes, {}
            if sizes["tensor"] > 1 or sizes["sequence"] > 1:
                layout = CHOICES[turn % len(CHOICES)]
                turn += 1
            found.append((kind, sizes, layout))
    return found


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--kinds", nargs="+", default=["dense", "moe", "union"])
    args = parser.parse_args()
    os.environ.setdefault("XLA_FLAGS", FLAGS)
    jax.config.update("jax_num_cpu_devices", 8)
    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)
    device = f"{jax.device_count()} simulated x {jax.devices()[0].device_kind}"
    about = {**header(stated=args.commit, device=device), "tolerance": TOLERANCE}
    rows: list[dict[str, Any]] = read_record(args.out).get("results", [])
    known = [(row["kind"], row["mesh"], row["layout"]) for row in rows]
    for case in cases(args.kinds):
        if case in known:
            continue
        row = compare(*case)
        rows.append(row)
        print(
            f"{row['kind']:6s} {describe_sizes(row['mesh']):34s} "
            f"gradient {row['gradient_difference']:.1e} "
            f"loss {row['loss_difference']:.1e} {row['seconds']:6.1f} s "
            f"{', '.join(row['layout'].values())}",
            flush=True,
        )
        write_record(args.out, about | {"results": rows})
    worst = max(max(r["gradient_difference"], r["loss_difference"]) for r in rows)
    print(f"{len(rows)} layouts, largest difference {worst:.1e}")
    return int(not worst <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
