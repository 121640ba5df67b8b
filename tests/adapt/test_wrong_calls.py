"""`apply_adapted` called a little wrong says value, rule and fix in one line."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from uoe_jax.adapt import AdapterConfig, apply_adapted, init_adapters
from uoe_jax.errors import ConfigError

PARAMS = {"w": jnp.ones((4, 3)), "v": jnp.ones((3, 2))}
X = jnp.ones((2, 4))


def fn(params, x):
    return x @ params["w"] @ params["v"]


def adapters_of(params):
    config = AdapterConfig(rank=1, method="lora", targets=("*",))
    return init_adapters(params, config, jax.random.key(0))


@pytest.fixture(scope="module")
def adapters():
    return adapters_of(PARAMS)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"fn": PARAMS}, ["fn is", "a function of the parameters"]),
        ({"params": {"w": PARAMS["w"]}}, ["adapter of 'v'", "hasn't"]),
        ({"params": {**PARAMS, "w": jnp.ones((5, 3))}}, ["[4, 3]", "[5, 3]"]),
        ({"adapters": PARAMS}, ["adapters is a dict", "init_adapters"]),
        ({"adapters": None}, ["adapters is a NoneType", "load_adapters"]),
        ({"adapters": "lora"}, ["adapters is a str"]),
        ({"adapters": [PARAMS]}, ["adapters[0] is a dict"]),
        ({"path": "fast"}, ["path is 'fast'", "factored"]),
        ({"path": None}, ["path is None"]),
        ({"training": "yes"}, ["'yes'", "True or False"]),
        ({"key": 3}, ["key is 3", "jax.random.key(0)"]),
        ({"key": jax.random.split(jax.random.key(0))}, ["one random key"]),
        ({"specs": P("tensor")}, ["specs is a", "names of weights"]),
        ({"specs": {"w": P()}}, ["specs has no v"]),
        ({"ways": "auto"}, ["no argument 'ways'"]),
    ],
)
def test_a_wrong_call_is_one_line(adapters, change, parts):
    given = dict(fn=fn, params=PARAMS, adapters=adapters) | change
    three = [given.pop(name) for name in ("fn", "params", "adapters")]
    with pytest.raises(ConfigError) as caught:
        apply_adapted(*three, X, **given)
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    for part in parts:
        assert part in said


def test_a_missing_argument_is_named():
    with pytest.raises(ConfigError, match="'adapters'"):
        apply_adapted(fn, PARAMS)


def test_right_calls_pass_and_the_checks_leave_no_trace(adapters):
    want = fn(PARAMS, X)
    for given in (adapters, [adapters], (adapters, adapters), []):
        np.testing.assert_allclose(apply_adapted(fn, PARAMS, given, X), want, atol=1e-5)
    programs = [
        str(jax.make_jaxpr(lambda p, x, run=run: run(fn, p, adapters, x))(PARAMS, X))
        for run in (apply_adapted, inspect.unwrap(apply_adapted))
    ]
    assert programs[0] == programs[1]
