"""The predicted step: what must hold for every layout, and the brief's own cases."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.config import LayoutConfig
from uoe_jax.hardware.count import count_params, flops_per_token, state_bytes
from uoe_jax.hardware.devices import parse_topology
from uoe_jax.hardware.roofline import DEFAULT_FACTORS, Calibration, predict
from uoe_jax.hardware.work import FLOP_KINDS, device_work, held_params
from uoe_jax.plan.layouts import make_plan
from uoe_jax.presets import get_preset

pytestmark = pytest.mark.both_jax

ONE = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
PRESETS = ("small", "small-moe", "small-union", "1b", "1b-union")


@pytest.mark.parametrize("name", PRESETS)
def test_one_devices_work_is_the_counted_flops(name):
    config = get_preset(name)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, remat="none")
    )
    work = device_work(config, ONE)
    tokens = config.data.batch_size * config.seq_len
    expected = flops_per_token(config.model, config.seq_len).training * tokens
    assert sum(work[kind] for kind in FLOP_KINDS) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["1b", "small-moe"])
def test_what_is_not_kept_is_computed_again(name):
    base = get_preset(name)
    work = {}
    for remat in ("none", "dots", "full"):
        model = dataclasses.replace(base.model, remat=remat, scan_layers=False)
        work[remat] = device_work(dataclasses.replace(base, model=model), ONE)
    none, dots, full = (work[remat] for remat in ("none", "dots", "full"))
    products = lambda found: found["products"] + found["routed products"]
    assert products(none) == products(dots) < products(full) < products(none) * 4 / 3
    for kind in ("scores", "elementwise"):
        assert none[kind] < dots[kind] == full[kind] <= none[kind] * 4 / 3
    assert none["output"] == dots["output"] == full["output"]


@settings(deadline=None, max_examples=30)
@given(
    name=st.sampled_from(PRESETS),
    powers=st.tuples(*[st.integers(0, 2)] * 4),
)
def test_devices_share_the_work(name, powers):
    """Routers are worked out by every tensor device, and the last of the sequence
    devices has the tokens that see most; all else is divided."""
    sizes = dict(zip(ONE, (2**p for p in powers), strict=True))
    config, count = get_preset(name), math.prod(sizes.values())
    whole, part = device_work(config, ONE), device_work(config, sizes)
    for kind in FLOP_KINDS:
        assert part[kind] * count >= whole[kind] * (1 - 1e-9)
        uneven = kind == "scores" and config.model.causal
        most = 2 - 1 / sizes["sequence"] if uneven else 1.2
        assert part[kind] <= whole[kind] / count * most + 1e-9
    heads = dataclasses.replace(config, layout=LayoutConfig(sequence_attention="heads"))
    even = device_work(heads, sizes)["scores"] * count
    assert even == pytest.approx(whole["scores"])
    held = held_params(config.model, sizes)
    assert sum(held.values()) <= sum(count_params(config.model).values())


def test_a_factor_scales_its_kind_of_work():
    config, topology = get_preset("small"), parse_topology("h200:1")
    base = predict(config, ONE, topology)
    doubled = Calibration(
        device="H200", factors={"products": 2 * DEFAULT_FACTORS["products"]}
    )
    more = predict(config, ONE, topology, doubled)
    gained = more.step_seconds - base.step_seconds
    assert gained == pytest.approx(base.work_seconds["products"])
    assert base.mfu > more.mfu > 0


def test_no_collectives_on_one_device_and_memory_of_the_state():
    found = predict(get_preset("small"), ONE, parse_topology("h200:1"))
    assert found.collectives == () and found.exposed_seconds == 0
    state = state_bytes(get_preset("small").model)
    for kind in ("parameters", "gradients", "optimizer"):
        assert found.memory[kind] == pytest.approx(state[kind])


def test_seven_billion_parameters_fit_a_pod_slice_and_not_four_small_chips():
    config = get_preset("7b")
    pod = make_plan(config, parse_topology("v5p:4x4x4"))
    assert pod.fitting and pod.fitting[0].shortfall == 0
    small = make_plan(config, parse_topology("v5e:2x2"))
    assert not small.fitting
    # 16 bytes a parameter over four chips is more than their memory.
    least = 16 * sum(count_params(config.model).values()) / 4
    assert small.too_large[0].memory_bytes > least > 16e9
    assert small.too_large[0].shortfall > least - 16e9


def test_scattered_tokens_send_what_all_reduces_send():
    """A reduce-scatter and an all-gather are the two halves of an all-reduce. Where
    layers are made again their inputs are gathered again, and MLPs' outputs aren't."""
    config, topology = get_preset("1b"), parse_topology("v5p:4x4x4")
    model = dataclasses.replace(config.model, remat="none")
    config = dataclasses.replace(config, model=model)
    sizes = {"data": 16, "fsdp": 1, "sequence": 1, "tensor": 4}
    times = []
    for choice in ("all_reduce", "reduce_scatter"):
        layout = LayoutConfig(tensor_reduce=choice)
        found = predict(dataclasses.replace(config, layout=layout), sizes, topology)
        times.append(sum(t for c, t in found.collectives if c.axis == "tensor"))
    assert times[0] == pytest.approx(times[1], rel=0.02)


def test_a_budget_is_less_memory():
    config, topology = get_preset("1b"), parse_topology("v5p:2x2x2")
    all_of_it = make_plan(config, topology)
    some = make_plan(config, topology, budget=12e9)
    assert 0 < len(some.fitting) < len(all_of_it.fitting)
    assert all(p.memory_bytes <= 12e9 for p in some.fitting)
