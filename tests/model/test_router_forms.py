"""Every router by itself: gradients, picks, gates, capacity, and wrong settings."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compare import assert_close
from tests.model.router_kinds import CAUSAL, LENGTH, LOOKING, OTHERS, config_of
from tests.model.tiny_models import build, tiny, tokens_like
from uoe_jax.config import (
    ExperimentConfig,
    MobaConfig,
    ModConfig,
    UnionConfig,
    UnionOverrides,
)
from uoe_jax.model.baselines.moe import MoeRouter, moe_gates
from uoe_jax.model.context import make_context
from uoe_jax.model.mlp import UnionMlp
from uoe_jax.model.routing import make_router
from uoe_jax.model.routing.selection import SelectionRouter, document_sums
from uoe_jax.model.routing.token import PatchRouter, within_capacity
from uoe_jax.ops.packing import pack_choices
from uoe_jax.train.step import router_metrics
from uoe_jax.validation import find_problems

ONE = jnp.ones((3, LENGTH), jnp.int32)
ROUTERS = {
    name: functools.partial(
        make_router,
        config=UnionConfig(num_experts=4, top_k=2, **options),
        causal=causal,
    )
    for causal, names in ((True, CAUSAL), (False, LOOKING))
    for name, options in names.items()
    if name
    not in ("shared keys", "gated values", "key router")  # of attention, not of routers
}


@pytest.mark.parametrize("name", [*ROUTERS, "moh", "sigmoid mixture"])
def test_router_weights_get_the_finite_difference_gradient(name):
    with jax.enable_x64(True):
        draw = np.random.default_rng(2)
        normal = lambda shape: jnp.asarray(draw.normal(size=shape))
        kind = "encoder" if name in LOOKING else "decoder"
        config = config_of(kind, name if name in OTHERS else "token")
        if name == "moh":
            router = build(config).trunk.blocks[0].attention.router
            router = jax.tree.map(lambda a: a[0], router)
        elif name in ROUTERS:
            router = ROUTERS[name](32, rngs=nnx.Rngs(0))
        else:
            gate = dataclasses.replace(config.moe, gate="sigmoid")
            router = MoeRouter(32, gate, True, rngs=nnx.Rngs(0))
        graphdef, params, rest = nnx.split(router, nnx.Param, ...)
        params = jax.tree.map(lambda a: normal(a.shape), params)
        rest = jax.tree.map(lambda a: a.astype("float64"), rest)
        x = normal((2, LENGTH, 32))
        context = make_context(config, x.shape[:2], train=True)
        probe = normal((2, LENGTH, 4))

        @jax.jit
        def loss(params):
            routing = nnx.merge(graphdef, params, rest)(x, context)
            return jnp.sum(routing.gates * probe[..., : routing.gates.shape[-1]])

        gradient = jax.jit(jax.grad(loss))(params)
        leaves, tree = jax.tree.flatten(params)
        for number, grad in enumerate(jax.tree.leaves(gradient)):
            direction = normal(grad.shape)
            sides = []
            for size in (1e-6, -1e-6):
                moved = list(leaves)
                moved[number] = leaves[number] + size * direction
                sides.append(float(loss(jax.tree.unflatten(tree, moved))))
            slope = (sides[0] - sides[1]) / 2e-6
            expected = float(jnp.sum(grad * direction))
            assert_close(slope, expected, 1e-5, least=0.1)
            assert abs(expected) > 1e-3


def apply_mlp(config, x, segments, train=False):
    """A union MLP whose router chooses clearly, its output and statistics."""
    layer = UnionMlp(config, rngs=nnx.Rngs(0))
    draw = np.random.default_rng(1)
    for weight in ("weight", "token_weight", "default"):
        if hasattr(layer.router, weight):
            value = getattr(layer.router, weight)
            value[...] = jnp.asarray(draw.normal(size=value.shape), jnp.float32)
    context = make_context(
        config, x.shape[:2], segments=segments, train=train, collect_choices=True
    )
    y, stats = jax.jit(lambda x: layer(x, context))(x)
    return layer, context, y, stats


X = jax.random.normal(jax.random.key(5), (3, LENGTH, 32))


def test_expert_choice_takes_the_best_tokens_of_each_sample_and_is_balanced():
    config = config_of("encoder", "expert choice")
    layer, _, _, stats = apply_mlp(config, X, ONE)
    choices, dropped = stats["choices"], stats["dropped"]
    scores = np.asarray(layer.router.scores(X))
    for sample in range(3):
        for expert in range(4):
            best = np.sort(np.argsort(-scores[sample, :, expert])[: LENGTH // 2])
            taken = np.flatnonzero(np.asarray(choices)[sample, :, expert] >= 0)
            np.testing.assert_array_equal(taken, best)
    assert dropped == 0
    # A padded sample's experts take the share of its real tokens.
    half = (jnp.arange(LENGTH) < 6)[None].astype(jnp.int32) * ONE
    choices = apply_mlp(config, X, half)[3]["choices"]
    np.testing.assert_array_equal(np.sum(np.asarray(choices) >= 0, axis=1), 3)
    assert np.all(np.asarray(choices)[:, 6:] == -1)


def test_capacity_drops_the_latest_picks_and_says_how_many():
    picks = jnp.array([[[0], [1], [0], [0], [1]]])
    kept = within_capacity(picks, 2, 2, None)
    np.testing.assert_array_equal(kept[0, :, 0], [True, True, True, False, True])
    pad = jnp.array([[0, 1, 1, 1, 1]])
    kept = within_capacity(picks, 2, 2, pad)
    np.testing.assert_array_equal(kept[0, :, 0], [False, True, True, True, True])
    config = config_of("decoder", "capacity")
    _, _, y, stats = apply_mlp(config, X, ONE, train=True)
    choices, dropped = stats["choices"], stats["dropped"]
    lost = np.asarray(choices) == -1
    assert lost.any()
    assert_close(dropped, lost.mean(), 1e-6)
    room = np.ceil(0.75 * LENGTH / 2)
    assert (
        max(np.sum(np.asarray(choices) == e, axis=(1, 2)).max() for e in range(4))
        <= room
    )
    both = np.all(lost, axis=-1)
    assert both.any()
    np.testing.assert_array_equal(np.asarray(y)[both], 0)
    metrics = router_metrics({"mlp": stats})
    assert metrics["dropped"] == metrics["router"]["mlp"]["dropped"] == dropped
    assert apply_mlp(config, X, ONE)[3]["dropped"] == 0  # evaluation never drops


def test_selection_pools_earlier_segments_and_starts_from_the_learned_scores():
    router = ROUTERS["selection"](32, rngs=nnx.Rngs(0))
    router.default[...] = jnp.array([1.0, -1.0, 0.5, 2.0])
    scores = np.asarray(router.scores(X), np.float64)
    context = make_context(config_of("decoder", "selection"), (3, LENGTH))
    decision = np.asarray(router.pool(router.scores(X), context))
    for start in range(0, LENGTH, 3):
        expected = scores[:, :start].mean(1) if start else router.default[...][None]
        got = decision[:, start : start + 3]
        np.testing.assert_allclose(
            got, np.broadcast_to(np.asarray(expected)[:, None], got.shape), atol=1e-5
        )


def test_document_sums_begin_anew():
    values = jax.random.normal(jax.random.key(0), (1, 6, 2))
    sums = document_sums(values, jnp.array([[0, 0, 2, 2, 2, 5]]))
    expected = [np.asarray(values)[0, a : b + 1].sum(0) for a, b in ((2, 4), (5, 5))]
    assert_close(sums[0, 4], expected[0], 1e-5)
    np.testing.assert_array_equal(sums[0, 5], values[0, 5])


def test_hierarchical_tokens_stay_inside_the_selection():
    config = config_of("decoder", "hierarchical")
    layer, context, _, stats = apply_mlp(config, X, ONE)
    decision = layer.router.pool(layer.router.scores(X), context)
    allowed = np.argsort(-np.asarray(decision), axis=-1)[..., :3]
    choices = np.asarray(stats["choices"])
    assert np.all(np.any(choices[..., None] == allowed[:, :, None], axis=-1))


def test_always_on_experts_have_gate_one_and_the_rest_is_routed():
    router = ROUTERS["always-on"](32, rngs=nnx.Rngs(0))
    routing = router(X, make_context(config_of("decoder", "token"), (3, LENGTH)))
    np.testing.assert_array_equal(routing.choices[..., 0], 0)
    np.testing.assert_array_equal(routing.gates[..., 0], 1)
    assert np.all(np.asarray(routing.choices)[..., 1:] > 0)
    assert len(np.unique(np.asarray(routing.choices)[..., 1:])) == 3
    assert routing.stats["load"].shape == (3,)


def test_attention_and_mlp_may_route_differently():
    config = dataclasses.replace(
        config_of("decoder", "token"),
        union_attention=UnionOverrides(
            num_experts=2, top_k=1, router="selection", segment_size=4
        ),
    )
    model = build(config)
    block = model.trunk.blocks[0]
    assert isinstance(block.attention.router, SelectionRouter)
    assert type(block.mlp.router) is PatchRouter
    _, aux = jax.eval_shape(model, tokens_like(config, 2, LENGTH, seed=3))
    assert aux["attention"]["load"].shape == (1, 2)
    assert aux["mlp"]["load"].shape == (1, 4)


def test_packing_puts_lost_picks_last_and_cuts_them_off():
    draw = np.random.default_rng(0)
    choices = jnp.asarray([draw.permutation(4)[:3] for _ in range(10)]).reshape(2, 5, 3)
    kept = jnp.asarray(draw.random((2, 5, 3)) < 0.6)
    count = int(kept.sum())
    for rows in (None, count):
        packing = pack_choices(choices, 4, kept, rows)
        assert packing.token_ids.shape == (rows or 30,)
        assert packing.group_offsets[-1] == packing.segment_offsets[-1] == count
        flat, ids = np.asarray(kept).reshape(10, 3), np.asarray(packing.row_ids)
        for token, pick in np.ndindex(10, 3):
            row = ids[token, pick]
            assert (row < count) == flat[token, pick]
            if row < count:
                assert packing.token_ids[row] == token
                group = np.searchsorted(packing.group_offsets, row, "right") - 1
                assert group == np.asarray(choices).reshape(10, 3)[token, pick]


def test_mixture_gates():
    scores = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    picks = jnp.array([[0, 2]])
    switch = moe_gates(scores, picks, "softmax_all")
    assert_close(switch, [[0.5, 0.2]], 1e-5)
    top2 = moe_gates(scores, picks, "softmax")
    assert_close(top2, [[5 / 7, 2 / 7]], 1e-5)
    affinity = 1 / (1 + 1 / np.array([0.5, 0.2]))
    assert_close(
        moe_gates(scores, picks, "sigmoid")[0], affinity / affinity.sum(), 1e-5
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_shared": 2}, "num_shared is 2.*0 to 1"),
        ({"router": "hierarchical", "selected": 1}, "selected is 1.*use 2"),
        ({"router": "selection", "patch_size": 4}, "patch_size is 4.*router token"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0.*positive"),
        ({"router": "selection", "capacity_factor": 1.0}, "only router token"),
    ],
)
def test_a_wrong_router_is_one_line(options, words):
    model = dataclasses.replace(
        config_of("decoder", "token"),
        union=UnionConfig(num_experts=4, top_k=2, **options),
    )
    problems = list(find_problems(ExperimentConfig(model=model)))
    assert any(re.search(words, problem) for problem in problems), problems


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"blocks": ("mod",), "mlp": ("union",)}, "layer 0 is a 'mod' block.*dense"),
        (
            {"blocks": ("mod",), "mod": ModConfig(keep=1.5)},
            r"keep is 1.5; it must be in \(0, 1\)",
        ),
        (
            {"blocks": ("mod",), "mod": ModConfig(bias_update_rate=1.5)},
            "bias_update_rate is 1.5; it must be 0 to 1",
        ),
        ({"moba": MobaConfig(block_size=0)}, "block_size is 0.*at least 1"),
        (
            {"attention": ("moh",), "union": UnionConfig(router="selection")},
            "'moh'.*use token",
        ),
        (
            {"attention": ("moh",), "union": UnionConfig(num_experts=4, top_k=1)},
            "softmax.*always 1",
        ),
    ],
)
def test_a_wrong_baseline_is_one_line(options, words):
    problems = list(find_problems(ExperimentConfig(model=tiny(**options))))
    assert any(re.search(words, problem) for problem in problems), problems
