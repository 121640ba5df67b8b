"""The kernels of a router of tokens, in triton's interpreter."""

from __future__ import annotations

from tests.ops.gpu import triton_on_cpu  # before anything that imports triton

# isort: split
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from tests.model.tiny_models import build, tokens_like, union
from uoe_jax.config import UnionConfig
from uoe_jax.errors import ConfigError
from uoe_jax.model.baselines.moe import MoeRouter
from uoe_jax.model.context import make_context
from uoe_jax.model.routing.token import PatchRouter
from uoe_jax.ops import measured, nvidia
from uoe_jax.ops.dispatch import served
from uoe_jax.ops.router.api import kernel_pays, pick_experts

# Of a score that is the sum of up to 200 float32 products, and of gradients.
EXACT, ROUNDED = 1e-5, 2.0**-7
# Tokens, width, experts and picks: tokens of one program, a part of one and several;
# widths that a block divides and that it doesn't.
SHAPES = [
    (64, 64, 4, 2),
    (130, 96, 16, 8),
    (7, 200, 6, 3),
    (65, 40, 64, 8),
    (70, 136, 40, 40),
    (33, 24, 5, 1),
]


def draw(seed, shape, dtype, whole=False):
    """Tokens, weights, biases, which count; `whole`: scores no sum of which is rounded.

    Then many are equal.
    """
    rng = np.random.default_rng(seed)
    tokens, width, experts, _ = shape
    if whole:
        some = lambda most, *sides: rng.integers(-most, most + 1, sides)
        x, weight = some(3, tokens, width), some(4, width, experts) / 64
        bias = some(2, experts) / 64
    else:
        x, weight = rng.normal(size=(tokens, width)), rng.normal(size=(width, experts))
        weight, bias = weight / width**0.5, rng.normal(size=experts) / 9
    counted = jnp.asarray(rng.random(tokens) < 0.7) if rng.integers(2) else None
    weight, bias = (jnp.asarray(a, jnp.float32) for a in (weight, bias))
    return jnp.asarray(x, dtype), weight, bias, counted


def draw_grads(seed, shape):
    rng = np.random.default_rng(seed + 1)
    tokens, _, experts, top_k = shape
    sizes = (tokens, top_k), (experts,), (), ()
    return tuple(jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes)


def both(x, weight, bias, counted, grads, top_k, implementation):
    """What is picked, and the gradients of tokens and weights."""

    @jax.jit
    def run(x, weight, bias, counted, grads):
        def call(x, weight):
            found = pick_experts(
                x, weight, bias, top_k, counted, implementation=implementation
            )
            return (found.scores, *found[3:]), found

        _, vjp, found = jax.vjp(call, x, weight, has_aux=True)
        return found, vjp(grads)

    with nvidia.interpreted(triton_on_cpu.run):
        return jax.block_until_ready(run(x, weight, bias, counted, grads))


def exactly(x, weight, counted, picks, grads):
    """The same in float64, given the picks."""
    x, weight, *grads = (np.asarray(a, np.float64) for a in (x, weight, *grads))
    d_chosen, d_probs, d_z, d_entropy = grads
    scores = x @ weight
    peak = scores.max(axis=1, keepdims=True)
    partition = peak + np.log(np.exp(scores - peak).sum(axis=1, keepdims=True))
    logs = scores - partition
    probs = np.exp(logs)
    entropy = -(probs * logs).sum(axis=1, keepdims=True)
    counts = np.ones(len(x)) if counted is None else np.asarray(counted, np.float64)
    hit = np.zeros_like(scores)
    np.put_along_axis(hit, picks, 1.0, axis=1)
    values = (
        np.take_along_axis(scores, picks, axis=1),
        counts @ hit,
        counts @ probs,
        counts @ partition[:, 0] ** 2,
        counts @ entropy[:, 0],
    )
    d_scores = probs * (d_probs - probs @ d_probs[:, None])
    d_scores += d_z * 2 * partition * probs - d_entropy * probs * (logs + entropy)
    d_scores *= counts[:, None]
    own = np.take_along_axis(d_scores, picks, axis=1) + d_chosen
    np.put_along_axis(d_scores, picks, own, axis=1)
    return scores, values, (d_scores @ weight.T, x.T @ d_scores)


def assert_near(got, want, bound):
    assert got.shape == want.shape
    size = max(1.0, float(np.abs(want).max(initial=0)))
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=bound * size)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@settings(deadline=None, max_examples=2)
@given(seed=st.integers(0, 2**31))
def test_values_and_gradients_are_those_of_float64(shape, dtype, seed):
    x, weight, bias, counted = draw(seed, shape, dtype)
    grads = draw_grads(seed, shape)
    how = x, weight, bias, counted, grads, shape[3]
    found, (dx, d_weight) = both(*how, "triton")
    picks = np.asarray(found.picks)
    scores, values, (want_dx, want_weight) = exactly(x, weight, counted, picks, grads)
    # Highest first; of those as good as equal, either.
    key = scores + np.asarray(bias, np.float64)
    ordered = -np.sort(-key, axis=1)[:, : shape[3]]
    assert_near(np.take_along_axis(key, picks, axis=1), ordered, EXACT)
    assert all(len(set(row)) == shape[3] for row in picks.tolist())
    for got, want in zip(found[1:], values, strict=True):
        assert_near(got, want, EXACT)
    assert dx.dtype == x.dtype and d_weight.dtype == jnp.float32
    assert_near(dx, want_dx, ROUNDED if dtype == "bfloat16" else EXACT)
    assert_near(d_weight, want_weight, EXACT)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@settings(deadline=None, max_examples=2)
@given(seed=st.integers(0, 2**31))
def test_of_equal_scores_the_lower_expert_goes_first(shape, dtype, seed):
    x, weight, bias, counted = draw(seed, shape, dtype, whole=True)
    weight = weight.at[:, -1].set(weight[:, 0])  # equal ones, whatever was drawn
    bias = bias.at[-1].set(bias[0])
    how = x, weight, bias, counted, draw_grads(seed, shape), shape[3]
    (got, got_grads), (want, want_grads) = both(*how, "triton"), both(*how, "xla")
    np.testing.assert_array_equal(got.picks, want.picks)
    np.testing.assert_array_equal(got.scores, want.scores)
    np.testing.assert_array_equal(got.counts, want.counts)
    rounded = ROUNDED if dtype == "bfloat16" else EXACT
    for mine, plain, bound in zip(got_grads, want_grads, (rounded, EXACT), strict=True):
        assert_near(mine, np.asarray(plain, np.float64), bound)


def test_of_scores_that_are_not_numbers_other_experts_are_picked():
    """Rows of different experts: the packing would write out of bounds otherwise."""
    x = np.zeros((5, 16), np.float32)
    x[0], x[1], x[2] = np.nan, np.inf, -np.inf
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)), jnp.float32)
    with nvidia.interpreted(triton_on_cpu.run), np.errstate(all="ignore"):
        found = pick_experts(
            jnp.asarray(x), weight, jnp.zeros(6), 6, implementation="triton"
        )
    np.testing.assert_array_equal(np.sort(found.picks, axis=1), [range(6)] * 5)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_what_devices_share_has_its_gradient_summed(implementation):
    shape = (20, 24, 6, 3)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, weight, bias, _ = draw(5, (40, *shape[1:]), "bfloat16", whole=True)
    grads = draw_grads(5, shape)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("data"), P()),
        out_specs=(P("data"), P(), P("data"), P()),
    )
    @jax.checkpoint
    def step(x, weight):
        def call(x, weight):
            how = {"implementation": implementation}
            found = pick_experts(x, weight, bias, shape[3], **how)
            sums = jax.lax.psum(found[3:], "data")
            return (found.scores, *sums), (found.picks, found.counts)

        out, vjp, aux = jax.vjp(call, x, weight, has_aux=True)
        vary = lambda a: jax.lax.pcast(a, "data", to="varying")
        dx, d_weight = vjp((vary(grads[0]), *grads[1:]))
        return aux[0], jax.lax.psum(aux[1], "data"), dx, d_weight

    with nvidia.interpreted(triton_on_cpu.run):
        picks, counts, dx, d_weight = jax.block_until_ready(jax.jit(step)(x, weight))
    wholly = jnp.concatenate([grads[0]] * 2), *grads[1:]
    want, (want_dx, want_weight) = both(x, weight, bias, None, wholly, 3, "xla")
    np.testing.assert_array_equal(picks, want.picks)
    np.testing.assert_array_equal(counts, want.counts)
    assert_near(dx, np.asarray(want_dx, np.float64), ROUNDED)
    assert_near(d_weight, np.asarray(want_weight, np.float64), EXACT)


def prefer_kernels():
    """A table in which the kernels measured faster."""
    names = lambda op, names, shape: sorted(names, key=lambda n: n != "triton")
    return mock.patch.object(measured, "prefer", names)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_a_tiny_union_has_the_same_loss_and_gradients(gate):
    config = union(
        union=UnionConfig(num_experts=4, top_k=3, gate=gate, num_shared=1),
        num_layers=1,
        remat="full",
    )
    graph, params, rest = nnx.split(build(config), nnx.Param, ...)
    tokens = tokens_like(config, 2, 11, 0)
    segments = jnp.asarray([[1] * 6 + [2] * 5, [1] * 8 + [0] * 3])

    def loss(params):
        model = nnx.merge(graph, params, rest)
        logits, aux = model(tokens, segments=segments, train=True)
        more = sum(s["balance_loss"].sum() + s["z_loss"].sum() for s in aux.values())
        stats = {part: s["load"] for part, s in aux.items()}
        return jnp.mean(jnp.square(logits)) + more, stats

    run = lambda: jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    want = jax.block_until_ready(run())
    served.pop("router", None)
    only = lambda x, weight: True
    where = "uoe_jax.model.routing.token.kernel_pays"
    with nvidia.interpreted(triton_on_cpu.run), mock.patch(where, only):
        with mock.patch.object(measured, "prefer", first_of_router):
            got = jax.block_until_ready(run())
    assert list(served["router"]) == ["triton"]
    got, want = (jax.tree.leaves(found) for found in (got, want))
    for mine, plain in zip(got, want, strict=True):
        assert_near(mine, np.asarray(plain, np.float64), EXACT)


def first_of_router(op, names, shape):
    """The kernels of routers, and of other operations plain JAX."""
    first = "triton" if op == "router" else "xla"
    return sorted(names, key=lambda name: name != first)


@pytest.mark.parametrize(
    ("changes", "context", "plain"),
    [
        ({}, {"train": True}, True),
        ({"patch_size": 2}, {}, False),
        ({"capacity_factor": 1.5}, {"train": True}, False),
        ({"capacity_factor": 1.5}, {}, True),
        ({"least_top_k": 1}, {}, True),
    ],
)
def test_only_plain_routers_go_to_the_kernels(changes, context, plain):
    config = UnionConfig(num_experts=4, top_k=2, **changes)
    router = PatchRouter(8, config, True, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 6, 8))
    with mock.patch("uoe_jax.model.routing.token.kernel_pays", lambda *_: True):
        served.pop("router", None)
        router(x, make_context(union(), (1, 6), **context))
    assert ("router" in served) == plain


def test_a_router_with_a_rule_of_its_own_keeps_it():
    config = union().moe
    router = MoeRouter(8, config, True, rngs=nnx.Rngs(0))
    assert not router._is_plain(make_context(union(), (1, 6)))


def test_kernels_are_chosen_where_a_table_says_so_and_they_can_serve():
    x, weight = jnp.ones((4, 8)), jnp.ones((8, 4))
    assert not kernel_pays(x, weight)
    with prefer_kernels():
        assert not kernel_pays(x, weight)  # no GPU
        with nvidia.interpreted(triton_on_cpu.run):
            assert kernel_pays(x, weight)
            assert not kernel_pays(x, jnp.ones((8, 65)))
            assert not kernel_pays(x, weight.astype(jnp.bfloat16))
            assert not kernel_pays(x[:0], weight)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"weight": jnp.ones((7, 4))}, "weight has 7 rows for tokens 8 wide"),
        ({"bias": jnp.ones(3)}, "3 biases for 4 experts"),
        ({"top_k": 5}, "top_k is 5 of 4 experts"),
        ({"top_k": 0}, "top_k is 0"),
        ({"counted": jnp.ones(5)}, r"counted is \[5\] for 6 tokens"),
        ({"implementation": "cuda"}, "'cuda'"),
        ({"implementation": "triton"}, "needs an NVIDIA GPU, not cpu"),
    ],
)
def test_calls_that_do_not_fit_are_one_line(changes, part):
    call = {"x": jnp.ones((6, 8)), "weight": jnp.ones((8, 4)), "bias": jnp.ones(4)}
    with pytest.raises(ConfigError, match=part) as caught:
        pick_experts(**{**call, "top_k": 2, **changes})
    assert "\n" not in str(caught.value)
