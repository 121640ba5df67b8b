"""Training with as many experts on as a step draws: one model for every budget."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compare import assert_close
from tests.model.tiny_models import build, forward, tiny, tokens_like
from tests.train.test_loop import assert_same_bits
from tests.train.tiny_runs import make_tiny, with_train
from uoe_jax.config import UnionConfig, UnionOverrides
from uoe_jax.errors import ConfigError
from uoe_jax.model import with_top_k
from uoe_jax.model.context import make_context
from uoe_jax.model.decoding.step import with_decode_weights
from uoe_jax.model.routing import make_router
from uoe_jax.model.routing.token import gates_of_some
from uoe_jax.train import train
from uoe_jax.validation import validate_model

UNION = {"attention": ("union",), "mlp": ("union",)}
ROUTERS = {
    "token": {},
    "softmax": {"gate": "softmax"},
    "shared": {"num_shared": 1, "least_top_k": 2},
    "selection": {"router": "selection", "segment_size": 3, "gate": "softmax"},
    "hierarchical": {"router": "hierarchical", "segment_size": 3, "selected": 4},
}


def drawn(**options):
    return UnionConfig(**{"num_experts": 4, "top_k": 4, "least_top_k": 1, **options})


@jax.jit
def trained(model, tokens, key):
    return model(tokens, key=key, train=True, collect_choices=True)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_draw_is_the_routing_of_a_smaller_top_k(name):
    union = drawn(**ROUTERS[name])
    router = make_router(16, union, True, rngs=nnx.Rngs(0))
    state = nnx.split(router)[1]
    noise = lambda a: jax.random.normal(jax.random.key(a.size), a.shape)
    state = jax.tree.map(noise, state)
    router = nnx.merge(nnx.split(router)[0], state)
    x = jax.random.normal(jax.random.key(1), (2, 9, 16))
    context = make_context(tiny(union=union), (2, 9), train=True)
    run = jax.jit(lambda key: router(x, context._replace(draw=key)))
    seen = set()
    for seed in range(40):
        found = run(jax.random.key(seed))
        count = int(found.kept[0, 0].sum())
        if count in seen:
            continue
        seen.add(count)
        small = dataclasses.replace(union, top_k=count, least_top_k=0)
        other = nnx.split(make_router(16, small, True, rngs=nnx.Rngs(0)))[0]
        wanted = nnx.merge(other, state)(x, context)
        np.testing.assert_array_equal(found.choices[..., :count], wanted.choices)
        assert_close(found.gates[..., :count], wanted.gates, 1e-6)
        assert (
            not np.any(found.gates[..., count:]) and not found.kept[..., count:].any()
        )
        for key, value in wanted.stats.items():
            np.testing.assert_allclose(found.stats[key], value, atol=1e-6)
    assert seen == set(range(union.least_top_k, 5))  # missed by 4 * 0.75**40 of seeds


def test_picks_that_are_off_take_no_room():
    """Four tokens fit an expert, and no more than four ask for it as their first."""
    union = drawn(num_experts=2, top_k=2, capacity_factor=0.5)
    router = make_router(4, union, True, rngs=nnx.Rngs(0))
    router.weight[...] = jnp.eye(4)[:, :2]
    x = jnp.eye(4)[jnp.array([0, 0, 0, 0, 1, 1, 1, 1])][None]
    context = make_context(tiny(union=union), (1, 8), train=True)
    run = jax.jit(lambda key: router(x, context._replace(draw=key)))
    # One expert is on for half of the keys.
    routings = [run(jax.random.key(seed)) for seed in range(12)]
    (one, *_) = [r for r in routings if not np.any(r.gates[..., 1:])]
    np.testing.assert_array_equal(one.kept, [[[True, False]] * 8])
    assert one.stats["dropped"] == 0


def test_every_layer_and_part_draws_its_own_and_evaluation_none():
    model = build(tiny(**UNION, union=drawn(), num_layers=3))
    tokens = tokens_like(model.config, 2, 12, seed=1)
    counts = []
    for seed in range(12):
        _, aux = trained(model, tokens, jax.random.key(seed))
        kept = [np.asarray(aux[part]["choices"]) >= 0 for part in UNION]
        per_layer = np.concatenate([k.sum(-1) for k in kept])  # [6, B, T]
        assert (per_layer == per_layer[:, :1, :1]).all()
        counts.append(per_layer[:, 0, 0])
    counts = np.array(counts)
    assert set(counts.ravel()) == {1, 2, 3, 4}
    for first in range(6):
        for second in range(first):
            assert np.any(counts[:, first] != counts[:, second])
    _, aux = forward(model, tokens)
    assert all((np.asarray(aux[part]["choices"]) >= 0).all() for part in UNION)


def test_a_model_is_used_with_another_number():
    config = tiny(
        **UNION,
        union=drawn(),
        union_attention=UnionOverrides(top_k=3, least_top_k=2),
    )
    model = build(config)
    tokens = tokens_like(config, 2, 12, seed=1)
    for count in (1, 3):
        small = with_top_k(model, count)
        _, aux = forward(small, tokens)
        assert all(aux[part]["choices"].shape[-1] == count for part in UNION)
    same = with_top_k(build(tiny(**UNION, union=drawn())), 4)
    full = forward(build(tiny(**UNION, union=drawn())), tokens)[0]
    np.testing.assert_array_equal(forward(same, tokens)[0], full)
    with pytest.raises(ConfigError, match="top_k 5 is more than"):
        with_top_k(model, 5)
    small = with_top_k(with_decode_weights(model, "int8"), 2)
    assert small.decode_weights == "int8" and model.decode_weights == "compute"


def test_a_run_goes_on_with_the_same_draws(tmp_path):
    rate = {"schedule": "constant"}  # the same for any number of steps
    config = make_tiny("union", cache_dir=tmp_path / "data", optim=rate, steps=8)
    model = dataclasses.replace(config.model, union=drawn(), remat="full")
    config = dataclasses.replace(config, model=model)
    train(config, tmp_path / "whole", quiet=True)
    train(with_train(config, steps=4), tmp_path / "parts", quiet=True)
    train(config, tmp_path / "parts", quiet=True)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")


def test_a_step_compiles_once_whatever_is_drawn():
    model = build(tiny(**UNION, union=drawn()))
    tokens = tokens_like(model.config, 2, 12, seed=1)
    run = jax.jit(lambda model, key: model(tokens, key=key, train=True)[0])
    for seed in range(4):
        run(model, jax.random.key(seed))
    assert run._cache_size() == 1


def test_softmax_gates_of_some_are_those_of_a_softmax_over_them():
    scores = jax.random.normal(jax.random.key(0), (1, 3, 4))
    gates = 4 * jax.nn.softmax(scores, axis=-1)
    on = jnp.broadcast_to(jnp.arange(4) < 3, scores.shape)
    found = gates_of_some(gates, on, "softmax")
    assert_close(found[..., :3], 3 * jax.nn.softmax(scores[..., :3], axis=-1), 1e-6)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"least_top_k": 5}, "draws from it to model.union.top_k 4, use 1 to 4"),
        ({"num_shared": 2, "least_top_k": 2}, "least_top_k is 2.*use 3 to 4"),
        ({"router": "threshold"}, "whose picks have no order; it is for router token"),
        (ROUTERS["hierarchical"] | {"gate": "softmax"}, "gate 'softmax', which the"),
    ],
)
def test_draws_that_cannot_be_are_one_line(options, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        validate_model(tiny(**UNION, union=drawn(**options)))
    assert "\n" not in str(caught.value)
