"""Which chips a compiled ring attention sends between: neighbours, or farther ones.

    python benchmarks/ring_pairs.py --out benchmarks/results/ring_pairs.json

Compiles ring attention ahead of time for TPUs that aren't here (needs libtpu) on meshes
in jax's order and in ours, reads the source and target of every collective-permute in
the compiled program, and counts the pairs that aren't joined by a link.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uoe_jax.files import format_json
from uoe_jax.model.sharded import ring_attention
from uoe_jax.ops.segment_attention.call import Mask
from uoe_jax.partition.rings import in_best_rings, in_rings
from uoe_jax.plan.aot import topology_devices
from uoe_jax.topology import from_devices

CASES = (("v4:2x2x1", (1, 4)), ("v5e:4x4", (2, 8)), ("v5e:4x4", (1, 16)))


def pairs_of(mesh):
    """Sources and targets of compiled collective-permutes, as places in the mesh."""
    size = mesh.shape["sequence"]
    split = PartitionSpec("data", "sequence")
    run = jax.shard_map(
        functools.partial(
            ring_attention, sees=Mask(True, None), axis="sequence", size=size
        ),
        mesh=mesh,
        in_specs=split,
        out_specs=split,
    )
    array = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, split))
    rows, length = mesh.shape["data"], 128 * size
    q = array((rows, length, 4, 128), jnp.bfloat16)
    k = array((rows, length, 2, 128), jnp.bfloat16)
    segments = array((rows, length), jnp.int32)
    with jax.set_mesh(mesh):
        traced = jax.jit(run).trace(q, k, k, segments)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    found = []
    for line in text.splitlines():
        if "collective-permute" in line and "source_target_pairs=" in line:
            listed = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", line)
            found.append(re.findall(r"\{(\d+),(\d+)\}", listed[1]))
    return [(int(a), int(b)) for pairs in found for a, b in pairs], len(found)


def count(devices, placed):
    """Pairs that are and aren't neighbours, and the most links between two."""
    graph, place = from_devices(devices)
    mesh = Mesh(placed, ("data", "sequence"))
    vertex = {devices[int(p)].id: v for v, p in enumerate(place)}
    order = [vertex[device.id] for device in placed.flat]
    pairs, permutes = pairs_of(mesh)
    hops = [graph.distances[order[a], order[b]] for a, b in pairs]
    return {
        "collective_permutes": permutes,
        "pairs": len(pairs),
        "not_neighbours": int(sum(h > 1 for h in hops)),
        "mean_hops": float(np.mean(hops)),
        "worst_hops": float(max(hops)),
    }


def main():
    """Compile each case in each order; print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("ring_pairs.json"))
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    versions = {n: importlib.metadata.version(n) for n in ("jax", "libtpu")}
    record = {"versions": versions, "cases": []}
    for name, shape in CASES:
        devices = list(topology_devices(name))
        jaxs = mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=True
        )
        orders = {
            "jax": jaxs,
            "auto": in_rings(jaxs),
            "ring": in_best_rings(jaxs, [1.0, 8.0]),
        }
        row = {"topology": name, "mesh": dict(zip(("data", "sequence"), shape,
                                                  strict=True))}  # fmt: skip
        for how, placed in orders.items():
            row[how] = count(devices, placed)
            print(name, shape, how, row[how], flush=True)
        record["cases"].append(row)
        options.out.write_text(format_json(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
