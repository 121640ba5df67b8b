"""Losses in the order of `layout.device_order ring` against jax's, bit by bit.

    JAX_PLATFORMS=cpu python benchmarks/device_orders.py --out FILE [--seconds 600]

Every legal layout of eight simulated devices (those of layout_matrix.py) of a dense
model, a mixture and a union: losses, router statistics and gradients in both orders,
the devices taken for a grid of 2 x 4 chips, where orders differ. Layouts that FILE has
aren't run again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import jax
import layout_matrix
import numpy as np
from flax import nnx

from tests.partition.tiny_layouts import compute, make_config
from uoe_jax.files import format_json
from uoe_jax.partition import rings
from uoe_jax.partition.mesh import mesh_for
from uoe_jax.topology import box_graph


def on_a_grid(devices):
    """The simulated devices as the chips of a grid of 2 x 4, by their ids."""
    return box_graph((2, 4), (0, 0)), np.argsort([d.id for d in devices])


def compare(kind, sizes, layout):
    """One layout in both orders: whether the order and any bit differ."""
    made = [
        make_config(kind, sizes, {**layout, "device_order": how})
        for how in ("jax", "ring")
    ]
    ids = [[d.id for d in mesh_for(config).devices.flat] for config in made]
    leaves = [jax.tree.leaves(compute(config)) for config in made]
    same = all(
        np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(*leaves, strict=True)
    )
    return {"kind": kind, "mesh": sizes, "layout": layout, "orders": ids,
            "bitwise_equal": same, "arrays": len(leaves[0])}  # fmt: skip


def main():
    """Compare layout by layout, print and write each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("device_orders.json"))
    parser.add_argument("--seconds", type=float, default=1e9)
    options = parser.parse_args()
    os.environ.setdefault("XLA_FLAGS", layout_matrix.FLAGS)
    jax.config.update("jax_num_cpu_devices", 8)
    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)
    rings.from_devices = on_a_grid
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    known = [(row["kind"], row["mesh"], row["layout"]) for row in rows]
    start = time.monotonic()
    for case in layout_matrix.cases(["dense", "moe", "union"]):
        if case in known or time.monotonic() - start > options.seconds:
            continue
        rows.append(compare(*case))
        print(*case, rows[-1]["orders"][0] != rows[-1]["orders"][1],
              rows[-1]["bitwise_equal"], flush=True)  # fmt: skip
        options.out.write_text(format_json(rows, indent=1) + "\n")
    return int(not all(row["bitwise_equal"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
