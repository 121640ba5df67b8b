"""The memory device simulated event by event agrees with its closed form."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.errors import ConfigError
from uoe_jax.hardware import pim, pim_events

SPEC = pim.SPECS["aim-gddr6"]
sizes = st.integers(1, 3000)


def test_closed_form_and_simulator_agree_to_one_percent(rng):
    """On 50 random products, each repeated until refreshes come in their rhythm."""
    for case, (outputs, inputs) in enumerate(rng.integers(1, 9000, (50, 2)).tolist()):
        for spec in list(pim.SPECS.values())[: 1 if case % 5 else 2]:
            one = pim.product(spec, outputs, inputs)
            times = max(1, round(1e5 / one.ns))
            got = pim_events.simulate(spec, [(outputs, inputs)] * times)
            assert got.commands["MAC_COL"] == times * one.columns
            assert got.ns == pytest.approx(times * one.ns, rel=0.01), (outputs, inputs)


@settings(deadline=None, max_examples=50)
@given(sizes, sizes)
def test_without_refreshes_they_are_equal(outputs, inputs):
    one = pim.product(SPEC, outputs, inputs)
    got = pim_events.simulate(SPEC, [(outputs, inputs)], refresh=False)
    assert got.ns == pytest.approx(one.ns / SPEC.refresh_factor, rel=1e-9)
    assert got.commands["ACT"] == one.rows
    assert got.commands["REF"] == 0


def test_refreshes_come_when_they_are_due():
    got = pim_events.simulate(SPEC, [(4096, 4096)] * 10)
    assert got.commands["REF"] == int(got.ns / (SPEC.t_refi + SPEC.t_rfc))
    # Each closes the row, which costs opening it again.
    columns = got.commands["MAC_COL"]
    assert columns / 64 < got.commands["ACT"] <= columns / 64 + got.commands["REF"]


def test_all_channels_take_the_time_of_one():
    products = [(777, 1500), (64, 3000)]
    one = pim_events.simulate(SPEC, products)
    assert pim_events.simulate(SPEC, products, channels=8) == one


@settings(deadline=None, max_examples=5)
@given(st.integers(1, 300), st.integers(1, 2100))
def test_every_weight_has_a_place_of_its_own(outputs, inputs):
    spec = dataclasses.replace(SPEC, channels=2)
    places = {
        pim_events.weight_place(spec, i, j, outputs, inputs)
        for i in range(0, outputs, 17)
        for j in range(inputs)
    }
    assert len(places) == len(range(0, outputs, 17)) * inputs
    for place in places:
        assert place.channel < 2 and place.bank < 16
        assert place.column < 64 and place.lane < 16


def test_rows_of_a_matrix_are_the_rows_that_are_opened():
    outputs, inputs = 1000, 1500
    rows = {
        pim_events.weight_place(SPEC, i, j, outputs, inputs).row
        for i in range(0, outputs, 128)  # bank 0
        for j in range(0, inputs, 16)
    }
    assert len(rows) == pim.product(SPEC, outputs, inputs).rows


def test_values_are_read_one_after_another():
    places = [pim_events.value_place(SPEC, 130, token, 2048) for token in range(2048)]
    numbers = [(p.row * 64 + p.column) * 16 + p.lane for p in places]
    assert numbers == list(range(numbers[0], numbers[0] + 2048))
    assert {(p.channel, p.bank) for p in places} == {(0, 2)}


def test_products_of_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"product is \(0, 5\)"):
        pim_events.simulate(SPEC, [(3, 4), (0, 5)])
    with pytest.raises(ConfigError, match="outside of"):
        pim_events.weight_place(SPEC, 4, 0, 4, 4)


def test_the_vector_chips_arithmetic(rng):
    x = rng.uniform(1e-6, 1e6, 10_000).astype(np.float32)
    wide = x.astype(np.float64)
    assert np.abs(pim_events.reciprocal(x) * wide - 1).max() < 1.5e-5
    assert np.abs(pim_events.reciprocal_sqrt(x) * np.sqrt(wide) - 1).max() < 6e-6
    x = rng.uniform(-60, 60, 10_000).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(pim_events.exponential(x) / exact - 1).max() < 1e-5
    scores = 30 * rng.normal(size=(50, 700))
    got = pim_events.softmax(scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = weights / weights.sum(-1, keepdims=True)
    assert np.abs(got.sum(-1) - 1).max() < 2e-5
    assert np.abs(got - want).max() < 2e-5
