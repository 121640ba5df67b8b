"""Names of slices count as Google counts; slices that are none are refused."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.errors import ConfigError
from uoe_jax.hardware.comms import place_axes
from uoe_jax.hardware.devices import DEVICES, find_device, parse_topology
from uoe_jax.hardware.slices import FAMILIES, slices


@pytest.mark.parametrize(
    ("name", "want", "devices"),
    [
        # Cloud TPU documentation: accelerator type, topology.
        ("v5litepod-1", "v5e:1x1", 1),
        ("v5litepod-4", "v5e:2x2", 4),
        ("v5litepod-8", "v5e:2x4", 8),
        ("v5litepod-16", "v5e:4x4", 16),
        ("v5litepod-32", "v5e:4x8", 32),
        ("v5litepod-64", "v5e:8x8", 64),
        ("v5litepod-128", "v5e:8x16", 128),
        ("v5litepod-256", "v5e:16x16", 256),
        ("v5e-16", "v5e:4x4", 16),
        ("v6e-8", "v6e:2x4", 8),
        ("v6e-256", "v6e:16x16", 256),
        ("v4-8", "v4:2x2x1", 4),
        ("v4-16", "v4:2x2x2", 8),
        ("v4-32", "v4:2x2x4", 16),
        ("v4-64", "v4:2x4x4", 32),
        ("v4-128", "v4:4x4x4", 64),
        ("v4-512", "v4:4x8x8", 256),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v5p-256", "v5p:4x4x8", 128),
        ("v5p-1024", "v5p:8x8x8", 512),
        ("v5p-2048", "v5p:8x8x16", 1024),
        ("v5p-12288", "v5p:16x16x24", 6144),
        ("tpu7x-8", "tpu7x:2x2x1", 8),
        ("tpu7x-128", "tpu7x:4x4x4", 128),
        ("TPU v5 lite:4x4", "v5e:4x4", 16),
        ("tpu-v5-lite-podslice:2x4", "v5e:2x4", 8),
        ("tpu-v6e-slice:2x4", "v6e:2x4", 8),
        ("V5P:4x4x4", "v5p:4x4x4", 64),
        ("v5:2x2x1", "v5p:2x2x1", 4),
        ("ironwood:2x2x1", "tpu7x:2x2x1", 8),
        ("a100-40gb:8", "a100-40gb:8", 8),
        ("a100-80gb:8", "a100:8", 8),
        ("nvidia-h100-80gb:8", "h100:8", 8),
        ("nvidia-tesla-t4:4", "t4:4", 4),
        ("h200:8", "h200:8", 8),
        ("cpu:8", "cpu:8", 8),
    ],
)
def test_names_are_translated(name, want, devices):
    found = parse_topology(name)
    assert (found.name, found.num_devices) == (want, devices)
    assert parse_topology(found.name) == found


def test_memory_is_that_of_the_name():
    assert parse_topology("a100-40gb:8").device.memory_bytes == 40e9
    assert parse_topology("a100:8").device.memory_bytes == 80e9
    assert find_device("NVIDIA A100-SXM4-40GB").memory_bytes == 40e9
    assert find_device("NVIDIA A100-SXM4-80GB").memory_bytes == 80e9
    assert find_device("NVIDIA H100 80GB HBM3").name == "H100"


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_every_device_is_found_by_its_name(device):
    assert find_device(device.name) == device


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("v5e:32x32", ["v5e:32x32", "v5e:16x16"]),
        ("v5e:2x8", ["v5e:4x4"]),
        ("v5e:4x2", ["use v5e:2x4"]),
        ("v6e:3x3", ["v6e:2x4"]),
        ("v5p:4x4x6", ["v5p:4x4x8", "v5p:4x4x4"]),
        ("v5p:1x1x1", ["v5p:2x2x1"]),
        ("v4:8x8x512", ["no v4 slice"]),
        ("v5p:4x2x2", ["use v5p:2x2x4"]),
        ("tpu7x:3x3x3", ["no tpu7x slice"]),
        ("v5e-12", ["12 chips", "v5e-8 or v5e-16"]),
        ("v5litepod-512", ["512 chips", "v5litepod-256"]),
        ("v5p-24", ["24 TensorCores", "v5p-16 or v5p-32"]),
        ("v5p-7", ["7 TensorCores", "v5p-8"]),
        ("v4-4", ["v4-8"]),
        ("v6e-0", ["0 chips", "v6e-1"]),
        ("v3-32", ["'v3-32'", "v5p"]),
        ("h100:99999999", ["at most 32768"]),
        ("h100:", ["KIND:COUNT"]),
        ("h100:-8", ["KIND:COUNT"]),
        ("h100:\u00b2", ["KIND:COUNT"]),
        ("cpu:8x8", ["write cpu:64"]),
        ("", ["known"]),
        ("v5p", ["v5p:4x4x4"]),
    ],
)
def test_slices_that_do_not_exist_are_refused_with_the_nearest(name, parts):
    with pytest.raises(ConfigError) as error:
        parse_topology(name)
    said = str(error.value)
    assert len(said.splitlines()) == 1
    for part in parts:
        assert part in said, said


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.integers(0, 20_000))
def test_a_type_is_a_slice_of_as_many_chips_or_names_such(name, number):
    family = FAMILIES[name]
    sizes = {math.prod(shape) * family.cores for shape in slices(name)}
    try:
        found = parse_topology(f"{name}-{number}")
    except ConfigError as error:
        assert number not in sizes
        named = str(error).rpartition("are ")[2].split(" or ")
        assert all(parse_topology(near).num_devices for near in named)
    else:
        chips = found.num_devices // (2 if name == "tpu7x" else 1)
        assert number in sizes and chips * family.cores == number


def test_a_slice_within_a_cube_closes_no_ring():
    sizes = {"data": 1, "fsdp": 1, "sequence": 4, "tensor": 8}
    inside = place_axes(parse_topology("v5p:2x4x4"), sizes)
    assert not any(ring.closed for group in inside.values() for ring in group.rings)
    cube = place_axes(parse_topology("v5p:4x4x4"), {**sizes, "tensor": 16})
    assert all(ring.closed for ring in cube["tensor"].rings)
