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
from uoe_jax.ops.token_router import RouterWeights, Scale, route


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


def test_a_slot_that_nobody_picked_may_hold_anything():
    draw = np.random.default_rng()
    picks = draw_picks(draw, 2, 4, 2, False)
    values = jnp.asarray(draw.normal(size=(2, 1, 4, 8)), jnp.float32)
    addition = Addition(
        jnp.asarray(draw.normal(size=(6, 4, 8)), jnp.float32), None, True
    )
    residual = jnp.zeros((2, 6))
    clean = add(Parts(values), addition, residual, picks)
    spoiled = jnp.where(picks.table[:, None, :, None] == 0, jnp.nan, values)
    np.testing.assert_array_equal(add(Parts(spoiled), addition, residual, picks), clean)
    assert np.all(np.isfinite(clean))
