"""Compare every legal layout of eight simulated devices with one device.

    JAX_PLATFORMS=cpu python benchmarks/layout_matrix.py [--kinds union] [--out FILE]

For a dense model, a mixture and a union, float32: the largest difference of the loss
and of any gradient, with the layout's choices in turn.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "partition"))

import jax
import numpy as np
from flax import nnx

from uoe_jax.partition.legal import verdicts
from uoe_jax.partition.plan import describe_sizes

CHOICES = (
    {},
    {"tensor_reduce": "reduce_scatter", "sequence_attention": "gather"},
    {"dispatch": "all_to_all", "experts": "round_robin"},
)


def largest_difference(a: Any, b: Any) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=["dense", "moe", "union"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_disable_most_optimizations", True)
    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)
    from tiny_layouts import compute, make_config, one_device

    rows, worst = [], 0.0
    for kind in args.kinds:
        legal = [v.sizes for v in verdicts(make_config(kind), 8) if not v.problems]
        for number, sizes in enumerate(legal):
            # Choices of an axis need its devices; the others run with the default.
            split = sizes["tensor"] > 1 or sizes["sequence"] > 1
            layout = CHOICES[number % len(CHOICES)] if split else {}
            start = time.perf_counter()
            got = compute(make_config(kind, sizes, layout))
            expected = one_device(kind)
            row = {
                "kind": kind,
                "mesh": sizes,
                "layout": layout,
                "gradient": largest_difference(expected[0], got[0]),
                "loss": largest_difference(expected[1:], got[1:]),
            }
            rows.append(row)
            worst = max(worst, row["gradient"], row["loss"])
            seconds = time.perf_counter() - start
            print(
                f"{kind:6s} {describe_sizes(sizes):34s} gradient {row['gradient']:.1e}"
                f" loss {row['loss']:.1e} {seconds:6.1f} s {layout}",
                flush=True,
            )
            if args.out:
                args.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{len(rows)} layouts, largest difference {worst:.1e}")
    return int(worst > 1e-5)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
