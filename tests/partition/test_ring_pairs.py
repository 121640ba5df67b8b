"""Which chips a compiled ring attention sends between: neighbours, in our order.

What was found for each slice is in benchmarks/results/ring_pairs.json.
"""

from __future__ import annotations

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uoe_jax.model.sequence import ring_attention
from uoe_jax.ops.segment_attention.call import Mask
from uoe_jax.partition.rings import Walks, in_best_rings, in_rings
from uoe_jax.plan.aot import topology_devices
from uoe_jax.topology import from_devices

CASES = (("v4:2x2x1", (1, 4)), ("v5e:4x4", (2, 8)), ("v5e:4x4", (1, 16)))


def sent_pairs(mesh):
    """Sources and targets of compiled collective-permutes, as places in the mesh."""
    size = mesh.shape["sequence"]
    split = PartitionSpec("data", "sequence")
    attend = functools.partial(
        ring_attention, sees=Mask(True, None), axis="sequence", size=size
    )
    run = jax.shard_map(attend, mesh=mesh, in_specs=split, out_specs=split)
    array = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, split))
    rows, length = mesh.shape["data"], 128 * size
    q = array((rows, length, 4, 128), jnp.bfloat16)
    k = array((rows, length, 2, 128), jnp.bfloat16)
    segments = array((rows, length), jnp.int32)
    with jax.set_mesh(mesh):
        traced = jax.jit(run).trace(q, k, k, segments)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    listed = re.findall(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", text)
    found = [re.findall(r"\{(\d+),(\d+)\}", pairs) for pairs in listed]
    return [(int(a), int(b)) for pairs in found for a, b in pairs]


def hops_of(devices, placed):
    """The links that each sent pair is apart."""
    graph, place = from_devices(devices)
    vertex = {devices[int(p)].id: v for v, p in enumerate(place)}
    order = [vertex[device.id] for device in placed.flat]
    mesh = Mesh(placed, ("data", "sequence"))
    return [graph.distances[order[a], order[b]] for a, b in sent_pairs(mesh)]


# libtpu exists for Linux on x86 only; elsewhere there is nothing to compile with.
if importlib.util.find_spec("libtpu") is not None:

    @pytest.mark.parametrize(("name", "shape"), CASES)
    def test_our_rings_send_between_neighbours_only(name, shape):
        devices = list(topology_devices(name))
        theirs = mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=True
        )
        walks = Walks((1e-3, 1.0), (1,))
        assert max(hops_of(devices, in_rings(theirs, walks))) == 1
        assert max(hops_of(devices, in_best_rings(theirs, walks))) == 1
        # Whoever finds 1 here too can leave our order out for this slice.
        assert max(hops_of(devices, theirs)) == {4: 2, 8: 4, 16: 1}[shape[1]]
