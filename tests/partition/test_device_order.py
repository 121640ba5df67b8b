"""`layout.device_order` changes which device stands where, and no loss by a bit."""

import json

import jax
import numpy as np
import pytest

from tests.partition.tiny_layouts import compute, make_config
from uoe_jax.errors import DataError
from uoe_jax.hardware.devices import parse_topology
from uoe_jax.partition import rings
from uoe_jax.partition.mesh import DeviceOrder, arranged, mesh_for
from uoe_jax.partition.stand_in import jax_order, stand_ins
from uoe_jax.runs.device_order import read_order, write_order
from uoe_jax.topology import box_graph
from uoe_jax.topology.rings import describe_order

CASES = {
    "dense": ("dense", {"data": 1, "sequence": 8}, {}),
    "union": ("union", {"data": 2, "sequence": 2, "tensor": 2}, {}),
}
LONG = pytest.mark.nightly  # both orders of a union compile anew


@pytest.fixture
def on_a_grid(monkeypatch):
    """The simulated devices as chips of a grid of 2 x 4, where orders differ."""

    def find(devices):
        return box_graph((2, 4), (0, 0)), np.argsort([d.id for d in devices])

    monkeypatch.setattr(rings, "from_devices", find)


def ids(mesh):
    return [device.id for device in mesh.devices.flat]


@pytest.mark.parametrize("case", ["dense", pytest.param("union", marks=LONG)])
def test_losses_are_those_of_jax_bit_by_bit(case, on_a_grid):
    kind, mesh, layout = CASES[case]
    plain = make_config(kind, mesh, {**layout, "device_order": "jax"})
    ring = make_config(kind, mesh, {**layout, "device_order": "ring"})
    if case == "dense":
        assert ids(mesh_for(plain)) != ids(mesh_for(ring)), "the order must differ"
    for a, b in zip(*map(jax.tree.leaves, map(compute, (plain, ring))), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rings_are_the_shortest(on_a_grid):
    config = make_config("dense", {"data": 1, "sequence": 8}, {"device_order": "ring"})
    order = np.array(ids(mesh_for(config))).reshape(1, 8)
    assert describe_order(box_graph((2, 4), (0, 0)), order).hops == (0.0, 1.0)


@pytest.mark.parametrize("how", ["auto", "jax", "ring"])
def test_orders_of_a_slice(how):
    topology = parse_topology("v5e:4x4")
    config = make_config("dense", {"data": 2, "sequence": 8}, {"device_order": how})
    start = jax_order(topology, (2, 8))
    placed = np.empty(16, object)
    placed[:] = stand_ins(topology)
    found = arranged(config, placed[start.ravel()].reshape(2, 8), ("data", "sequence"))
    hops = rings.mean_hops(found)
    if how == "jax":
        assert hops == [2.0, 1.75]
        assert [d.id for d in found.flat] == start.ravel().tolist()
    else:  # gradients over data are most of the bytes, but the compiler's
        assert sorted(d.id for d in found.flat) == list(range(16))
        assert hops == [2.0, 1.0]


def test_other_devices_keep_jaxs_order():
    for how in ("auto", "jax", "ring"):
        config = make_config("dense", {"sequence": 8}, {"device_order": how})
        assert ids(mesh_for(config)) == list(range(8))


def test_a_runs_order_is_taken_again(tmp_path, on_a_grid):
    config = make_config("dense", {"data": 1, "sequence": 8}, {"device_order": "ring"})
    mesh = mesh_for(config)
    write_order(tmp_path, "ring", mesh)
    found = read_order(tmp_path, "ring")
    assert found == DeviceOrder({"data": 1, "sequence": 8}, ids(mesh))
    turned = DeviceOrder(found.mesh, found.ids[::-1])
    assert ids(mesh_for(config, recorded=turned)) == turned.ids
    for other in (
        DeviceOrder({"data": 2, "sequence": 4}, turned.ids),
        DeviceOrder(found.mesh, [*turned.ids[:-1], 99]),
    ):
        assert ids(mesh_for(config, recorded=other)) == ids(mesh)
    assert read_order(tmp_path, "jax") is None
    assert read_order(tmp_path / "absent", "ring") is None


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"device_order": "ring"}',
                '{"device_order": "ring", "mesh": {}, "devices": ["x"]}']
)  # fmt: skip
def test_a_spoilt_record_is_one_line(tmp_path, content):
    (tmp_path / "devices.json").write_text(content)
    with pytest.raises(DataError, match=r"devices\.json isn't a record") as caught:
        read_order(tmp_path, "ring")
    assert "\n" not in str(caught.value)


def test_training_records_its_order(tmp_path):
    from uoe_jax.cli import main

    args = ["train", "tiny", "--train.steps", "1", "--run-dir", str(tmp_path / "r")]
    args += ["--quiet", "--layout.device-order", "ring", "--data.batch-size", "8"]
    assert main(args) == 0
    found = json.loads((tmp_path / "r" / "devices.json").read_text())
    assert found["device_order"] == "ring"
    assert sorted(found["devices"]) == sorted(d.id for d in jax.devices())
