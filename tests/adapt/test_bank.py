"""Adapters side by side: switched, replaced and mixed by one compiled function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.adapt.moved_adapters import move_adapters
from tests.compare import assert_close
from uoe_jax.adapt import (
    AdapterConfig,
    WeightAxes,
    apply_adapted,
    as_tucker,
    leaf_delta,
    mix_adapters,
    pad_ranks,
    select_adapter,
    set_adapter,
    stack_adapters,
)
from uoe_jax.adapt.apply import make_term
from uoe_jax.errors import ConfigError


@pytest.fixture(scope="module")
def params():
    return {"w": jax.random.normal(jax.random.key(0), (12, 10))}


@pytest.fixture(scope="module")
def singles(params):
    """LoRA adapters of ranks 1 to 4."""
    config = lambda r: AdapterConfig(method="lora", rank=r, targets=("w",))
    return [move_adapters(params, config(r), seed=r) for r in (1, 2, 3, 4)]


def fn(params, x):
    return x @ params["w"]


def plain(params, single, x):
    """The function of weight + delta, in numpy."""
    return np.asarray(x @ (params["w"] + leaf_delta(single, single["w"])))


def test_switching_and_replacing_never_recompile(params, singles, make):
    bank, x = stack_adapters(singles), jnp.ones((2, 12))
    traces = []

    @jax.jit
    def run(bank, index, x):
        traces.append(index)
        return apply_adapted(fn, params, select_adapter(bank, index), x)

    for index, single in enumerate(singles):
        want = plain(params, single, x)
        assert_close(run(bank, index, x), want, 1e-4, least=1.0)
    config = AdapterConfig(method="lora", rank=2, targets=("w",))
    other = make(params, config, seed=9)
    swapped = set_adapter(bank, 3, other)
    want = plain(params, other, x)
    assert_close(run(swapped, 3, x), want, 1e-4, least=1.0)
    assert len(traces) == 1


@pytest.fixture(scope="module")
def tuckers(params):
    """Tucker adapters of ranks 1 to 4, and their mixed bank's outputs by path."""
    config = lambda r: AdapterConfig(method="tucker", rank=r, targets=("w",))
    sets = [move_adapters(params, config(r), seed=r) for r in (1, 2, 3, 4)]
    bank = stack_adapters(sets)

    @jax.jit
    def run(mix, x):
        mixed = mix_adapters(bank, mix)
        call = lambda path: apply_adapted(fn, params, mixed, x, path=path)
        return call("factored"), call("fused")

    return sets, run


@given(st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4))
@settings(max_examples=25, deadline=None)
def test_mixed_banks_are_the_weighted_sum(params, tuckers, mix):
    sets, run = tuckers
    want = sum(m * leaf_delta(s, s["w"]) for m, s in zip(mix, sets, strict=True))
    x = jnp.ones((2, 12))
    for got in run(jnp.asarray(mix), x):
        assert_close(got, x @ (params["w"] + want), 1e-4, least=1.0)


def test_each_row_may_have_its_own_adapter(params, singles):
    bank, x = stack_adapters(singles), jax.random.normal(jax.random.key(1), (4, 12))
    order = jnp.asarray([2, 0, 3, 2])

    @jax.jit
    @jax.vmap
    def rows(index, row):
        single = select_adapter(bank, index)
        return apply_adapted(fn, params, single, row[None])[0]

    got = rows(order, x)
    for row, index in enumerate(order.tolist()):
        want = plain(params, singles[index], x[row])
        assert_close(got[row], want, 1e-4, least=1.0)


def test_lora_and_tucker_share_a_bank(params, singles, make):
    tucker = make(params, AdapterConfig(rank=4, targets=("w",)))
    same = as_tucker(singles[1])
    want = leaf_delta(singles[1], singles[1]["w"])
    assert_close(leaf_delta(same, same["w"]), want, 1e-5)
    bank = stack_adapters([tucker, same])
    back = select_adapter(bank, 1)
    assert_close(leaf_delta(back, back["w"]), want, 1e-5)


def test_what_cant_stand_side_by_side_is_named(params, singles, make):
    tucker = make(params, AdapterConfig(rank=2, targets=("w",)))
    with pytest.raises(ConfigError, match="one method"):
        stack_adapters([singles[0], tucker])
    with pytest.raises(ConfigError, match="highest"):
        pad_ranks(singles[3], singles[0])
    other = {"v": params["w"]}
    foreign = make(other, AdapterConfig(method="lora", rank=2, targets=("v",)))
    with pytest.raises(ConfigError, match="same targets"):
        stack_adapters([singles[0], foreign])
    dora = AdapterConfig(method="lora", rank=2, targets=("w",), use_dora=True)
    bank = stack_adapters([make(params, dora, seed=s) for s in (0, 1)])
    with pytest.raises(ConfigError, match="select one"):
        apply_adapted(fn, params, bank, jnp.ones((2, 12)))


def test_places_and_shares_that_a_bank_hasnt_are_named(singles):
    bank = stack_adapters(singles)
    with pytest.raises(ConfigError, match="adapter 4 of a bank of 4"):
        select_adapter(bank, 4)
    with pytest.raises(ConfigError, match="adapter -5"):
        set_adapter(bank, -5, singles[0])
    with pytest.raises(ConfigError, match="each of the 4"):
        mix_adapters(bank, jnp.ones(3))
    with pytest.raises(ConfigError, match="not a bank"):
        select_adapter(singles[0], 0)


def test_no_letter_of_an_axis_is_the_banks_own(make):
    """Every letter an axis may have, as a batch axis: none meets the bank's."""
    for letter in "abcdefghjklmnpqrstuvwxyz":
        axes = {"w": WeightAxes(axes=f"{letter}io", ins="i", outs="o")}
        params = {"w": jnp.ones((2, 3, 4))}
        config = AdapterConfig(method="lora", rank=1, targets=("w",))
        sets = [make(params, config, seed=s, axes=axes) for s in (0, 1)]
        bank = mix_adapters(stack_adapters(sets), jnp.ones(2))
        term = make_term(bank["w"], bank.weights["w"], bank.scales["w"])
        assert all(len(set(word)) == len(word) for word in term.labels)
