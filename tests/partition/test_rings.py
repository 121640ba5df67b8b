"""Rings of mesh axes take single hops of the torus where it has a cycle of them."""

import itertools
from dataclasses import dataclass
from inspect import unwrap

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import mesh_utils

from tests.compare import assert_close
from uoe_jax.config import MeshConfig
from uoe_jax.partition.mesh import make_mesh
from uoe_jax.partition.rings import Walks, in_best_rings, in_rings, mean_hops
from uoe_jax.topology import from_devices
from uoe_jax.topology.rings import describe_order

KINDS = {"v4": "TPU v4", "v5p": "TPU v5p", "v5e": "TPU v5 lite", "v6e": "TPU v6 lite"}


@dataclass(frozen=True)
class Chip:
    """A stand-in for a chip: what jax's own order and ours read of one."""

    id: int
    coords: tuple[int, ...]
    device_kind: str
    core_on_chip: int = 0
    slice_index: int = 0
    platform: str = "tpu"
    process_index: int = 0


def chips(name, cores=1):
    """Return the devices of "v5e:4x4", x fastest, as libtpu lists them."""
    kind, _, sides = name.partition(":")
    sides = [int(side) for side in sides.split("x")]
    sides += [1] * (3 - len(sides))
    places = itertools.product(*(range(n) for n in reversed(sides)), range(cores))
    return [
        Chip(number, (x, y, z), KINDS.get(kind, kind), core)
        for number, (z, y, x, core) in enumerate(places)
    ]


def by_jax(devices, shape):
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def links(a, b, name):
    """Return how many links lie between two chips: the oracle, by search."""
    kind, _, sides = name.partition(":")
    sides = [int(side) for side in sides.split("x")]
    flat = len(sides) == 2
    cubes = not flat and all(side % 4 == 0 for side in sides)
    total = 0
    for side, p, q in zip(sides, a.coords, b.coords, strict=False):
        ways = [abs(p - q)]
        if cubes or (flat and side == 16):
            ways.append(side - abs(p - q))
        total += min(ways)
    return total


def hops(placed, name):
    """Return the mean links between ring neighbours of each axis, pair by pair."""
    found = []
    for axis, size in enumerate(placed.shape):
        if size == 1:
            found.append(0.0)
            continue
        rows = np.moveaxis(placed, axis, 0).reshape(size, -1)
        pairs = [
            links(rows[i, j], rows[(i + 1) % size, j], name)
            for i in range(size)
            for j in range(rows.shape[1])
        ]
        found.append(sum(pairs) / len(pairs))
    return found


def walks(shape, axis=-1):
    """The walks of a program that sends round one axis, the last if not given."""
    walked = axis % len(shape)
    counts = (1.0 if i == walked else 1e-3 for i in range(len(shape)))
    return Walks(tuple(counts), (walked,))


@pytest.mark.parametrize(
    ("name", "shape", "want"),
    [
        ("v4:2x2x1", (4,), [1]),
        ("v5p:2x2x1", (4,), [1]),
        ("v5e:2x2", (4,), [1]),
        ("v5e:2x4", (8,), [1]),
        ("v5e:2x4", (2, 4), [2, 1]),
        ("v5e:4x4", (2, 8), [2, 1]),
        ("v5e:4x4", (4, 4), [2, 1]),
        ("v5e:4x4", (16,), [1]),
        ("v6e:2x4", (8,), [1]),
        ("v6e:8x8", (64,), [1]),
        ("v6e:8x8", (4, 16), [3, 1]),
        ("v5p:2x2x2", (8,), [1]),
        ("v5p:2x2x4", (16,), [1]),
        ("v5p:2x4x4", (4, 8), [1.5, 1]),
        ("v5p:4x4x4", (64,), [1]),
        ("v5p:4x4x4", (4, 16), [1, 1]),
        ("v5p:4x4x4", (8, 8), [2, 1]),
        ("v5p:4x4x8", (2, 64), [2, 1]),
    ],
)
def test_rings_take_single_hops(name, shape, want):
    devices = chips(name)
    placed = in_rings(by_jax(devices, shape), walks(shape))
    assert sorted(d.id for d in placed.flat) == list(range(len(devices)))
    found = hops(placed, name)
    assert_close(found, mean_hops(placed), 1e-9)
    assert all(ours <= limit + 1e-9 for ours, limit in zip(found, want, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_never_worse_than_jax(data):
    name = data.draw(
        st.sampled_from(
            ["v4:2x2x1", "v5e:2x4", "v5e:4x8", "v6e:8x8", "v5p:2x2x4", "v5p:4x4x4"]
        )
    )
    devices = chips(name)
    left, shape = len(devices), []
    for _ in range(3):
        size = data.draw(st.sampled_from([d for d in range(1, 65) if left % d == 0]))
        shape.append(size)
        left //= size
    shape = (*shape, left)
    theirs = by_jax(devices, shape)
    axis = data.draw(st.integers(0, len(shape) - 1))
    ours = in_rings(theirs, walks(shape, axis))
    before, after = (described(placed) for placed in (theirs, ours))
    assert after.hops[axis] <= before.hops[axis] + 1e-9
    assert after.worst[axis] <= before.worst[axis]
    assert after.loads[axis] <= before.loads[axis]
    assert_close(after.hops, hops(ours, name), 1e-9)
    assert sorted(d.id for d in ours.flat) == list(range(len(devices)))
    again = in_rings(by_jax(devices, shape), walks(shape, axis))
    assert [d.id for d in again.flat] == [d.id for d in ours.flat]


def described(placed):
    graph, place = from_devices(placed.ravel().tolist())
    return describe_order(graph, np.argsort(place).reshape(placed.shape))


def test_the_cores_of_a_chip_are_neighbours():
    devices = chips("TPU7x:2x2x1", cores=2)
    devices = np.array([*devices, None], object)[:-1]
    placed = in_rings(devices.reshape(1, 8), walks((1, 8)))
    assert mean_hops(placed) == [0, 1]


def test_other_devices_stay_where_they_are():
    devices = chips("v5e:2x4")
    hole = [*devices[:6], Chip(9, (5, 5, 0), KINDS["v5e"]), devices[7]]
    slices = [*devices[:4], *(Chip(8 + i, d.coords, d.device_kind, 0, 1)
                              for i, d in enumerate(devices[:4]))]  # fmt: skip
    gpus = [Chip(i, (i, 0, 0), "NVIDIA H100 80GB HBM3") for i in range(8)]
    for odd in (hole, slices, gpus, jax.devices()[:8]):
        array = np.empty(8, object)
        array[:] = odd
        assert in_rings(array, walks((8,))) is array
        assert in_best_rings(array, walks((8,))) is array


def test_chips_in_parts_stay_where_they_are():
    devices = [Chip(i, (x, 0, 0), KINDS["v5e"]) for i, x in enumerate((0, 1, 3, 4))]
    array = np.empty(4, object)
    array[:] = devices
    assert in_best_rings(array, walks((4,))) is array


def test_axes_that_no_program_walks_keep_jaxs_order(monkeypatch):
    devices = chips("v5e:2x4")
    theirs = by_jax(devices, (2, 4))
    assert in_rings(theirs, Walks((1.0, 8.0), ())) is theirs
    monkeypatch.setattr("uoe_jax.partition.mesh.Mesh", lambda placed, *a, **k: placed)
    placed = unwrap(make_mesh)(MeshConfig(data=2, tensor=4), devices=devices)
    assert [d.id for d in placed.flat] == [d.id for d in theirs.flat]
