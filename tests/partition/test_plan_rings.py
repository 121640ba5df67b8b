"""The predicted time of a ring's step counts links, in the order that a run has."""

import dataclasses
import itertools

import pytest

from uoe_jax.config import LayoutConfig
from uoe_jax.hardware.comms import Group, Ring, RingStep, seconds
from uoe_jax.hardware.devices import parse_topology
from uoe_jax.plan.layouts import make_plan
from uoe_jax.plan.rings import ring_steps
from uoe_jax.presets import get_preset

SIZES = {"data": 2, "fsdp": 1, "sequence": 8, "tensor": 1}


def steps(how, name="v5e:4x4", sizes=SIZES, **layout):
    config = dataclasses.replace(
        get_preset("small"), layout=LayoutConfig(device_order=how, **layout)
    )
    return ring_steps(config, sizes, parse_topology(name))


def test_orders_of_a_grid():
    """On a grid of 4 x 4 jax's ring of 8 has a hop of 4; ours has none over 1."""
    assert steps("jax")["sequence"].hops == 4
    assert steps("auto") == {"sequence": RingStep(hops=1.0, load=1.0)}
    assert steps("ring") == steps("auto")


@pytest.mark.parametrize("name", ["v5e:4x4", "v5e:4x8", "v6e:8x8", "v5p:2x4x4"])
def test_no_order_is_slower_for_a_ring_than_jaxs(name):
    """On 4 x 8 chips a tensor axis in single hops made rings of 4 wait twice as long.

    What the compiler sends over the other axes is more, and must count for nothing.
    """
    count = parse_topology(name).num_devices
    better = 0
    for sequence, tensor in itertools.product((2, 4, 8, 16, 32), (1, 2, 4, 8)):
        if count % (sequence * tensor):
            continue
        rest = count // (sequence * tensor)
        sizes = {"data": 1, "fsdp": rest, "sequence": sequence, "tensor": tensor}
        theirs = steps("jax", name, sizes)["sequence"]
        for how in ("auto", "ring"):
            ours = steps(how, name, sizes)["sequence"]
            assert ours.hops <= theirs.hops and ours.load <= theirs.load, (how, sizes)
            better += ours != theirs
    assert better


def test_nothing_to_say_elsewhere():
    assert steps("auto", "h100:8", {**SIZES, "data": 1}) == {}
    assert steps("auto", sequence_attention="gather") == {}
    assert steps("auto", sizes={**SIZES, "sequence": 1, "tensor": 8}) == {}


@pytest.mark.parametrize(("hops", "load"), [(1, 1), (4, 2), (2, 3)])
def test_seconds_of_a_step(hops, load):
    link = parse_topology("v5e:4x4").device.link
    step = RingStep(hops=float(hops), load=float(load))
    group = Group(link=link, size=8, rings=(Ring(size=8, closed=False),), step=step)
    found = seconds("collective_permute", 8e6, group)
    want = 1e6 / link.bandwidth * load + hops * link.latency
    assert abs(found - want) < 1e-9 * want


def test_a_plan_is_slower_in_jaxs_order():
    def time(how):
        config = get_preset("small")
        config = dataclasses.replace(config, layout=LayoutConfig(device_order=how))
        fixed = {"data": 2, "sequence": 8, "fsdp": 1, "tensor": 1}
        found = make_plan(config, parse_topology("v5e:4x4"), fixed=fixed)
        (layout, *_) = [*found.fitting, *found.too_large]
        return sum(
            seconds
            for c, seconds in layout.collectives
            if c.kind == "collective_permute"
        )

    assert time("jax") > time("auto")
