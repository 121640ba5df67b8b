"""Decoding inside the memory: the closed form, its mapping and its floors."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.config import ModelConfig, UnionConfig
from uoe_jax.errors import ConfigError
from uoe_jax.hardware import pim
from uoe_jax.hardware.decoding import roofline_decode
from uoe_jax.presets import get_preset

SPEC = pim.SPECS["aim-gddr6"]
sizes = st.integers(1, 6000)


def gpt(layers, width, heads, head_dim=None, **changes):
    """A model of the GPT family as the study decodes it."""
    return ModelConfig(
        vocab_size=50257,
        max_seq_len=1024,
        d_model=width,
        d_ff=4 * width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim or width // heads,
        **changes,
    )


XL = gpt(24, 2048, 24, 128)  # 2048 / 24 isn't a whole number


def union(top_k, experts=8):
    """A model whose experts fill all banks evenly: 1024 neurons each."""
    changes = {"mlp": ("union",)} if top_k else {}
    config = UnionConfig(num_experts=experts, top_k=max(1, top_k))
    return gpt(24, 2048, 16, **changes, union=config)


def mlp_seconds(model, **how):
    phases = pim.decode_cost(model, 512, SPEC, **how).phases
    return phases["MLP in"] + phases["MLP out"]


def test_the_peaks_are_the_published_ones():
    assert SPEC.peak_bandwidth == 4.096e12 and SPEC.peak_flops == 4.096e12
    assert SPEC.capacity == 4e9


@settings(deadline=None)
@given(sizes, sizes)
def test_no_product_beats_its_bytes(outputs, inputs):
    work = pim.product(SPEC, outputs, inputs)
    assert work.ns * 1e-9 >= 2 * outputs * inputs / SPEC.peak_bandwidth
    assert work.rows >= 1 and work.columns >= work.rows


@given(st.integers(1, 60), st.integers(1, 8))
def test_one_column_in_64_opens_a_row(rounds, rows):
    work = pim.product(SPEC, rounds * 128, rows * 1024)
    assert 1 - work.rows / work.columns == 63 / 64


@given(st.integers(1024, 9000), sizes)
def test_long_parts_hit_open_rows(held, inputs):
    work = pim.product(SPEC, held * 128, inputs)
    # A vector that ends in a column's first number leaves the rest of it empty.
    assert 1 - work.rows / work.columns >= 0.95


SLOWER = {
    "t_rcd": 2,
    "t_rp": 2,
    "t_ccd": 2,
    "t_rfc": 2,
    "t_refi": 0.5,
    "pin_gbits": 0.5,
    "pins": 0.5,
    "banks": 0.5,
    "channels": 0.5,
    "asic_ghz": 0.5,
    "asic_adders": 0.5,
    "asic_multipliers": 0.5,
    "t_wr": 2,
    "asic_exposed": 2,
}


@pytest.mark.parametrize("name", SLOWER)
def test_a_token_takes_no_less_on_a_slower_device(name):
    value = getattr(SPEC, name) * SLOWER[name]
    value = int(value) if isinstance(getattr(SPEC, name), int) else float(value)
    value = min(value, 1.0) if name == "asic_exposed" else value
    slower = dataclasses.replace(SPEC, capacity_bits=1e11, **{name: value})
    before = pim.decode_cost(XL, 512, SPEC).seconds
    after = pim.decode_cost(XL, 512, slower).seconds
    assert after >= before
    if name in ("t_ccd", "banks", "channels", "t_rcd"):
        assert after > 1.05 * before


def test_time_is_a_line_in_the_context():
    contexts = np.arange(128, 1025, 128)
    times = [pim.decode_cost(XL, int(c), SPEC).seconds for c in contexts]
    fit = np.polyval(np.polyfit(contexts, times, 1), contexts)
    rest = ((times - fit) ** 2).sum() / ((times - np.mean(times)) ** 2).sum()
    assert rest < 0.001


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 6, 8])
def test_an_mlps_time_is_its_active_share(top_k):
    """(t(f) - t(0)) / (t(1) - t(0)) = f, where t(0) has no MLP at all."""
    share = mlp_seconds(union(top_k)) / mlp_seconds(union(0))
    assert abs(share - top_k / 8) < 0.05 * top_k / 8


def test_experts_in_banks_of_their_own_save_nothing():
    own = mlp_seconds(union(2), experts="own_banks")
    assert own == pytest.approx(mlp_seconds(union(8)), rel=1e-9)
    with pytest.raises(ConfigError, match="experts is 'some'"):
        pim.decode_cost(union(2), 512, SPEC, experts="some")


def test_attention_of_a_union_opens_its_experts_rows_only():
    dense = pim.decode_cost(union(0), 1000, SPEC).phases
    half = dataclasses.replace(
        union(0), attention=("union",), union=UnionConfig(num_experts=8, top_k=4)
    )
    routed = pim.decode_cost(half, 1000, SPEC).phases
    for name in ("q, k, v", "attention out"):
        assert routed[name] == pytest.approx(dense[name] / 2, rel=0.05)
    # Half of the heads see the half of the tokens that chose them.
    assert routed["scores"] < 0.4 * dense["scores"]
    assert "routers" in routed and "routers" not in dense


def test_the_vector_chip_is_calibrated_on_the_published_share():
    """1.2 +- 0.5% of GPT3-XL isn't products at 1 GHz; 100 MHz costs 5 to 20%."""

    def rest(spec):
        phases = pim.decode_cost(XL, 512, spec).phases
        names = ("softmax", "norms and sums", "activation")
        return sum(phases[name] for name in names), sum(phases.values())

    part, whole = rest(SPEC)
    assert 0.007 < part / whole < 0.017
    _, slow = rest(dataclasses.replace(SPEC, asic_ghz=0.1))
    assert 1.05 < slow / whole < 1.20


def test_energy_has_every_part():
    one = pim.Work(ns=7280.0, rows=1.0, columns=64.0, written=2.0, asic_ns=10.0)
    # By hand, in joules: mA x V x ns = 1.25e-12.
    want = 128 * 30 * 39 + 128 * 64 * 438 + 128 * 2 * 378 + 8 * 7280 * 92
    want = 1.25e-12 * (want + 8 * 1 * 185 * 455)
    want += (64 * 8 * 149.29 + 10 * 304.59) * 1e-12
    assert pim.joules(SPEC, one) == pytest.approx(want, rel=1e-12)


def test_two_timings_are_shipped_and_the_slower_one_is_slower():
    slow = pim.decode_cost(XL, 512, pim.SPECS["aim-gddr6-unindp"])
    assert 1.5 < slow.seconds / pim.decode_cost(XL, 512, SPEC).seconds < 2.2
    eight = pim.find_spec("AIM-gddr6:16")
    assert (eight.channels, eight.name) == (16, "aim-gddr6:16")
    twice = pim.decode_cost(XL, 512, eight).seconds
    assert 0.45 < twice / pim.decode_cost(XL, 512, SPEC).seconds < 0.65


@pytest.mark.parametrize("text", ["aim-gddr6:0", "aim-gddr6:x", "aim-gddr6:", "aim:8"])
def test_devices_that_dont_exist_are_named(text):
    with pytest.raises(ConfigError, match="device is"):
        pim.find_spec(text)


def test_specs_are_checked():
    with pytest.raises(ConfigError, match="channels"):
        dataclasses.replace(SPEC, channels=0.5)
    for sizes in ((0, 4), (4, 0)):
        with pytest.raises(ConfigError, match="at least 1"):
            pim.product(SPEC, *sizes)


def test_what_cant_be_decoded_there_is_refused():
    for preset, says in (
        ("tiny-mod", "has mod"),
        ("7b", "its weights alone take"),
        ("1b", "max_seq_len to at most"),
    ):
        model = get_preset(preset).model
        with pytest.raises(ConfigError, match=says):
            pim.decode_cost(model, 100, SPEC)
    with pytest.raises(ConfigError, match="context is 1025; the model takes 1 to 1024"):
        pim.decode_cost(XL, 1025, SPEC)
    encoder = dataclasses.replace(XL, kind="encoder")
    with pytest.raises(ConfigError, match="only a decoder"):
        pim.decode_cost(encoder, 10, SPEC)


def test_the_longest_context_that_is_offered_fits():
    model = dataclasses.replace(get_preset("1b").model, max_seq_len=5666)
    pim.decode_cost(model, 5666, SPEC)
    with pytest.raises(ConfigError):
        longer = dataclasses.replace(model, max_seq_len=5667)
        pim.decode_cost(longer, 100, SPEC)


def test_a_roofline_is_bytes_over_bandwidth():
    model = get_preset("small").model
    found = roofline_decode(model, 100, "h200")
    weights = 12 * (4 * 768**2 + 8 * 768**2) + 768 * model.vocab_size
    keys = 2 * 12 * 768 * 100
    assert found.seconds == pytest.approx(2 * (weights + keys) / 4.8e12, rel=0.01)
    assert found.joules == pytest.approx(700 * found.seconds)
    with pytest.raises(ConfigError, match="device is 'h201'; did you mean h200"):
        roofline_decode(model, 100, "h201")
    with pytest.raises(ConfigError, match="t4 holds 16 GB"):
        big = dataclasses.replace(get_preset("7b").model, num_layers=64)
        roofline_decode(big, 100, "t4")
