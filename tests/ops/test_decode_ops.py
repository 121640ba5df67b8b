"""What operations of single tokens refuse; values are of tests/ops/suite.py."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.decode_oracle import draw_picks
from uoe_jax.errors import ConfigError
from uoe_jax.ops.cache_attention.api import Heads, Place, Store, attend
from uoe_jax.ops.token_products.api import (
    Addition,
    Parts,
    Projection,
    add,
    project,
)
from uoe_jax.ops.token_products.eight_bits import to_int8
from uoe_jax.ops.token_router import RouterWeights, Scale, route


def test_eight_bits_are_half_a_scale_off_at_most(rng):
    weight = rng.normal(size=(3, 2, 5, 40)).astype(np.float32)
    weight[1, 0, 2] = 0  # an output without weights
    weight[2] *= 1e-3  # each output has its own scale
    numbers, scales = to_int8(jnp.asarray(weight))
    assert numbers.dtype == jnp.int8 and scales.shape == weight.shape[:-1]
    back = np.asarray(numbers, np.float64) * np.asarray(scales, np.float64)[..., None]
    room = np.asarray(scales)[..., None] * (0.5 + 1e-5)
    assert np.all(np.abs(back - weight) <= room)
    most = np.abs(np.asarray(numbers, int)).max(-1)
    assert np.all((most == 127) | (most == 0)) and most[1, 0, 2] == 0


def test_wrong_calls_are_refused_in_one_line():
    x, weight = jnp.zeros((1, 8)), jnp.zeros((1, 1, 4, 8))
    norm = Scale(jnp.ones(8), 1e-5)
    router = RouterWeights(jnp.zeros((8, 4)), jnp.zeros(4), 2)
    store = Store(*[jnp.zeros((1, 1, 6, 2, 4))] * 2)
    heads, place = Heads(2, 1, 4), Place(0, jnp.zeros(1, jnp.int32))
    calls = {
        "activation is 'relu'": lambda: project(x, Projection(weight, None, "relu")),
        "1 sides for activation 'swiglu'": lambda: project(
            x, Projection(weight, None, "swiglu")
        ),
        "x are 8 wide and the weights read 9": lambda: project(
            x, Projection(jnp.zeros((1, 1, 4, 9)))
        ),
        "3 experts without picks": lambda: project(
            x, Projection(jnp.zeros((3, 1, 4, 8)))
        ),
        "values are 5 wide and the weights read 8": lambda: add(
            Parts(jnp.zeros((1, 1, 1, 5))), Addition(jnp.zeros((4, 1, 8))), x[:, :4]
        ),
        "rule is 'max'": lambda: route(x, norm, _with(router, rule="max")),
        "top_k is 5 of 4": lambda: route(x, norm, _with(router, top_k=5)),
        "heads are 8 wide; 2 key heads of 1 queries, width 4, are 24": lambda: attend(
            jnp.zeros((1, 1, 8)), store, place, heads
        ),
        "a log of experts and picks go together": lambda: attend(
            jnp.zeros((1, 1, 24)),
            store._replace(experts=jnp.zeros((1, 1, 6), jnp.int32)),
            place,
            heads,
        ),
        "needs an NVIDIA GPU": lambda: project(
            x, Projection(weight), implementation="triton"
        ),
    }
    for message, call in calls.items():
        with pytest.raises(ConfigError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value)


def _with(router, **changes):
    return dataclasses.replace(router, **changes)


def test_a_slot_that_nobody_picked_may_hold_anything(rng):
    picks = draw_picks(rng, 2, 4, 2, False)
    values = jnp.asarray(rng.normal(size=(2, 1, 4, 8)), jnp.float32)
    addition = Addition(
        jnp.asarray(rng.normal(size=(6, 4, 8)), jnp.float32), None, True
    )
    residual = jnp.zeros((2, 6))
    clean = add(Parts(values), addition, residual, picks)
    spoiled = jnp.where(picks.table[:, None, :, None] == 0, jnp.nan, values)
    np.testing.assert_array_equal(add(Parts(spoiled), addition, residual, picks), clean)
    assert np.all(np.isfinite(clean))
