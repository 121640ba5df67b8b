"""Single tokens: products by pick, routers and cached attention in plain JAX."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.decode_oracle import check_add, check_attend, check_project, check_route
from uoe_jax.errors import ConfigError
from uoe_jax.ops.cache_attention.api import Heads, Place, Store, attend
from uoe_jax.ops.token_products.api import (
    Addition,
    Parts,
    Projection,
    add,
    project,
)
from uoe_jax.ops.token_router.api import RouterWeights, Scale, route

# rows, experts, picks (0: one expert), inputs, outputs, activation, bias, norm
PROJECT = [
    (1, 1, 0, 32, 48, "none", False, True),
    (1, 1, 0, 20, 7, "swiglu", True, True),
    (1, 4, 2, 32, 24, "swiglu", False, False),
    (3, 16, 2, 24, 10, "gelu", True, False),
    (2, 5, 3, 16, 8, "gelu_erf", False, True),
]
# rows, experts, picks, inputs of a pick, outputs, parts, head width, gated, bias
ADD = [
    (1, 1, 0, 48, 20, 1, 48, False, True),
    (1, 1, 0, 64, 20, 3, 16, False, False),
    (1, 4, 2, 32, 24, 2, 16, True, True),
    (3, 16, 2, 24, 10, 1, 24, True, False),
    (2, 5, 3, 21, 8, 1, 21, False, False),
]
# rows, width, experts, picks, always on, rule, bias of the sigmoid
ROUTE = [
    (1, 32, 4, 2, 0, "sigmoid", False),
    (3, 20, 5, 3, 1, "scaled_softmax", False),
    (2, 16, 8, 1, 0, "softmax_all", False),
    (2, 24, 6, 4, 2, "affinity", True),
    (1, 16, 3, 3, 0, "one", False),
    (1, 16, 33, 5, 0, "softmax", False),
]
# rows, experts, picks, J, G, H, tokens, window, norms, rotation, by pick
ATTEND = [
    (2, 0, 1, 2, 3, 8, 20, None, False, True, True),
    (1, 0, 1, 3, 1, 16, 40, 7, True, True, True),
    (1, 4, 2, 1, 1, 8, 30, None, False, True, True),
    (3, 4, 2, 2, 2, 12, 12, 5, True, False, False),
    (2, 5, 3, 1, 2, 16, 70, None, False, True, False),
]


@pytest.mark.parametrize("case", PROJECT)
def test_project_matches_float64(case):
    check_project(case, "xla")


@pytest.mark.parametrize("case", ADD)
def test_add_matches_float64(case):
    check_add(case, "xla")


@pytest.mark.parametrize("case", ROUTE)
def test_route_matches_float64(case):
    check_route(case, "xla")


@pytest.mark.parametrize("case", ATTEND)
def test_attention_matches_float64_and_writes_the_token(case):
    check_attend(case, "xla")


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
    import dataclasses

    return dataclasses.replace(router, **changes)


def test_a_slot_that_nobody_picked_may_hold_anything():
    from tests.ops.decode_oracle import draw_picks

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
