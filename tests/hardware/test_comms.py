"""Collective times against hand-computed bounds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.errors import ConfigError
from uoe_jax.hardware.comms import KINDS, Group, place_axes, seconds
from uoe_jax.hardware.devices import Link, parse_topology

pytestmark = pytest.mark.both_jax

GB = 1e9
TORUS = Link(
    kind="torus",
    bandwidth=90 * GB,
    network=6 * GB,
    dimensions=3,
    latency=0.0,
    source="test",
)
SWITCH = Link(
    kind="switch", bandwidth=450 * GB, network=50 * GB, latency=0.0, source="test"
)


def groups(topology, **sizes):
    sizes = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1, **sizes}
    return place_axes(parse_topology(topology), sizes)


def test_a_closed_ring_sends_both_ways():
    group = groups("v5p:4x4x4", tensor=4)["tensor"]
    assert [(r.size, r.closed) for r in group.rings] == [(4, True)]
    expected = 1e9 * 3 / 4 / (2 * 90 * GB) + 2e-6
    assert seconds("all_gather", 1e9, group) == pytest.approx(expected)


def test_dimensions_add_up_and_open_ends_halve():
    group = groups("v5p:4x4x4", fsdp=16, tensor=4)["fsdp"]
    assert len(group.rings) == 2 and all(ring.closed for ring in group.rings)
    one = groups("v5p:4x4x4", tensor=4)["tensor"]
    whole = seconds("all_gather", 64e9, group)
    assert whole == pytest.approx(64e9 * 15 / 16 / (4 * 90 * GB) + 4e-6)
    assert seconds("all_gather", 64e9, one) > 1.5 * whole
    half = groups("v5p:4x4x4", tensor=2)["tensor"]
    assert not half.rings[0].closed


def test_a_part_of_a_ring_hops_over_the_inner_axis():
    found = groups("v5e:4x4", sequence=2, tensor=2)
    assert found["tensor"].rings[0].hop == 1
    rings = found["sequence"].rings
    assert len(rings) == 1 and rings[0].hop in (1, 2)


def test_switches_know_where_their_domain_ends():
    inside = groups("h100:16", data=2, tensor=8)
    assert not inside["tensor"].spans_network and inside["data"].spans_network
    fast = seconds("all_reduce", 1e9, inside["tensor"])
    assert fast == pytest.approx(2 * (1e9 * 7 / 8 / (450 * GB) + 7 * 5e-6))
    slow = seconds("all_gather", 1e9, inside["data"])
    assert slow == pytest.approx(1e9 / 2 / (50 * GB) + 5e-6)


@settings(deadline=None, max_examples=30)
@given(
    kind=st.sampled_from(KINDS),
    size=st.sampled_from([2, 4, 8]),
    num_bytes=st.floats(1e3, 1e12),
    link=st.sampled_from([TORUS, SWITCH]),
)
def test_more_bytes_take_more_time_and_all_reduce_is_both_halves(
    kind, size, num_bytes, link
):
    topology = "v5p:4x4x4" if link is TORUS else "h200:8"
    group = groups(topology, tensor=size)["tensor"]
    time = seconds(kind, num_bytes, group)
    assert 0 < time < seconds(kind, 2 * num_bytes, group)
    halves = [seconds(k, num_bytes, group) for k in ("reduce_scatter", "all_gather")]
    assert seconds("all_reduce", num_bytes, group) == pytest.approx(sum(halves))


def test_one_device_says_nothing():
    assert seconds("all_reduce", 1e12, Group(link=SWITCH, size=1)) == 0


@pytest.mark.parametrize(
    "name,message",
    [
        ("v9:2x2", "topology is 'v9:2x2'; did you mean"),
        ("v5p:4x4", "v5p chips form 3 dimensions, write v5p:4x4x4"),
        ("h200:2x2", "form 1 dimension, write h200:4"),
        ("h200", "write chips as KIND:COUNT"),
        ("v5e:0x2", "write chips as KIND:COUNT"),
    ],
)
def test_a_bad_topology_says_what_is_right(name, message):
    with pytest.raises(ConfigError, match=message):
        parse_topology(name)
