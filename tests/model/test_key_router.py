"""Selective attention whose keys and values have a router of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compare import assert_close
from tests.model.test_cache import check_decoding
from tests.model.tiny_models import (
    assert_is_dense_when_cut,
    build,
    tiny,
    tokens_like,
)
from uoe_jax.config import HeadGroups, UnionConfig
from uoe_jax.errors import ConfigError
from uoe_jax.hardware.count import (
    activation_bytes,
    cache_bytes,
    count_params,
    flops_per_token,
)
from uoe_jax.model import param_shapes
from uoe_jax.model.context import make_context
from uoe_jax.model.paired_attention import PairedAttention, list_places, seen_places
from uoe_jax.ops.packing import gather_rows, pack_choices
from uoe_jax.validation import validate_model

UNION = {"attention": ("union",), "mlp": ("union",)}


def paired(options=None, **model):
    options = {"top_k": 2} | (options or {})
    union = UnionConfig(num_experts=4, gated_values=True, key_router=True, **options)
    return tiny(**UNION, union=union, **model)


def layer_of(config, seed=0):
    """Return a one-layer model's attention with routers that tell tokens apart."""
    layer: PairedAttention = build(config).trunk.blocks[0].attention
    layer = jax.tree.map(lambda a: a[0], layer)
    draw = np.random.default_rng(seed)
    for weight in (layer.router.weight, layer.router.key_weight):
        weight[...] = jnp.asarray(draw.normal(size=weight.shape), jnp.float32)
    return layer


def by_hand(layer, x, segments, window):
    """Return the output of one sample in float64: every head, every pair of tokens.

    And how often a token sees nothing where it asks, and is stored elsewhere.
    """
    x64 = np.asarray(x[0], np.float64)
    weigh = lambda a: np.asarray(a[...], np.float64)
    router, count = layer.router, len(x64)

    def gates(weight):
        scores = x64 @ weigh(weight)
        picks = np.argsort(-scores, axis=1)[:, : router.top_k]
        found = np.zeros((count, router.num_experts))
        at = np.arange(count)[:, None]
        found[:, : router.num_shared] = 1.0
        some = 2 / (1 + np.exp(-np.take_along_axis(scores, picks, 1)))
        found[at, picks + router.num_shared] = some
        return found

    asks, stores = gates(router.weight), gates(router.key_weight)
    place = np.arange(count)
    sees = (place[:, None] >= place) & (place[:, None] - place < window)
    sees &= np.asarray(segments)[:, None] == np.asarray(segments)
    out, blind = np.zeros_like(x64), 0
    for expert in range(router.num_experts):
        q = np.einsum("td,djgh->tjgh", x64, weigh(layer.wq)[expert])[:, 0]
        k = np.einsum("td,djh->tjh", x64, weigh(layer.wk)[expert])
        v = np.einsum("td,djh->tjh", x64, weigh(layer.wv)[expert])[:, 0]
        turn = lambda a: np.asarray(
            layer.settle(jnp.asarray(a, jnp.float32), None, jnp.arange(count))
        )
        scores = np.einsum("tgh,sh->gts", turn(q), turn(k)[:, 0]) / q.shape[2] ** 0.5
        weights = np.exp(scores) * (sees & (stores[:, expert] != 0))
        total = weights.sum(-1, keepdims=True)
        blind += ((total[0, :, 0] == 0) & (asks[:, expert] != 0)).sum()
        weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
        heads = np.einsum("gts,sh->tgh", weights, v * stores[:, expert, None])
        read = np.einsum("tgh,ghd->td", heads, weigh(layer.wo)[expert][0])
        out += read * asks[:, expert, None]
    return out, blind, ((asks != 0) != (stores != 0)).sum()


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("window", [0, 3])
def test_the_output_is_that_of_every_head_by_hand(shared, window):
    config = paired({"num_shared": shared}, num_layers=1, window=(window,))
    layer = layer_of(config)
    x = jax.random.normal(jax.random.key(0), (1, 13, 32))
    segments = jnp.array([[1] * 5 + [2] * 6 + [0] * 2])
    context = make_context(config, (1, 13), segments=segments)
    wanted, blind, apart = by_hand(layer, x, segments[0], window or 13)
    assert_close(layer(x, context)[0][0], wanted, 1e-5)
    assert blind > 0 and apart > 0  # else one router would do


@pytest.mark.parametrize("sample", [0, 1, 2])
def test_what_is_no_number_stays_in_its_sample(sample):
    config = paired(num_layers=1)
    layer, context = layer_of(config), make_context(config, (3, 13))
    x = jax.random.normal(jax.random.key(4), (3, 13, 32))
    others = np.arange(3) != sample
    wanted = np.asarray(layer(x, context)[0])
    for token in (0, 9):
        spoilt = layer(x.at[sample, token].set(jnp.nan), context)[0]
        assert np.isnan(spoilt[sample, token]).all()
        assert_close(spoilt[others], wanted[others], 1e-6)


def test_all_experts_with_unit_gates_are_the_dense_model():
    assert_is_dense_when_cut(paired({"top_k": 4}))


@pytest.mark.parametrize("groups", [None, HeadGroups(local=2, window=4)])
def test_decoding_equals_the_full_forward(groups):
    more = {} if groups is None else {"head_groups": groups, "convolution": 3}
    config = paired({"gate": "softmax"}, **more)
    model = jax.tree.map(lambda a: a, build(config))  # others have the same
    for block in model.trunk.blocks:  # so that tokens ask where none is stored
        for weight in (
            block.attention.router.weight,
            block.attention.router.key_weight,
        ):
            weight[...] = 50 * weight[...]
    tokens = tokens_like(config, 3, 12, seed=2)
    check_decoding(model, tokens, jnp.array([5, 1, 3]), 6)


def test_the_loss_trains_both_routers():
    config = paired(num_layers=1)
    layer = layer_of(config)
    x = jax.random.normal(jax.random.key(1), (2, 9, 32))
    context = make_context(config, (2, 9))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(params):
        y = nnx.merge(graph, params, rest)(x, context)[0]
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape))

    found = jax.grad(loss)(params)["router"]
    for name in ("weight", "key_weight"):
        assert np.abs(np.asarray(found[name][...])).max() > 1e-3, name
    # A finite difference of one entry of the router of keys.
    step = 1e-2
    moved = [
        loss(jax.tree.map(lambda a: a, with_entry(params, sign * step)))
        for sign in (1, -1)
    ]
    slope = (moved[0] - moved[1]) / (2 * step)
    largest = np.abs(np.asarray(found["key_weight"][...])).max()
    assert_close(found["key_weight"][...][0, 1], slope, 2e-2 * float(largest))


def with_entry(params, by):
    params = jax.tree.map(lambda a: a, params)
    weight = params["router"]["key_weight"]
    weight[...] = weight[...].at[0, 1].add(by)
    return params


def test_statistics_and_balance_are_of_both_routers():
    config = paired(num_layers=1)
    layer = layer_of(config)
    x = jax.random.normal(jax.random.key(2), (3, 8, 32))
    context = make_context(config, (3, 8))._replace(collect_choices=True)
    asked, stored = layer.router.both(x, context)
    count = lambda r: np.bincount(np.asarray(r.choices).ravel(), minlength=4)
    both = np.concatenate([count(asked), count(stored)])
    assert_close(asked.stats["load"], both / both.sum(), 1e-6)
    assert (np.asarray(asked.stats["stored"]) == np.asarray(stored.choices)).all()
    # A bias moves the side that it is of, and no other.
    layer.router.bias[...] = layer.router.bias[...].at[5].set(100.0)
    again, moved = layer.router.both(x, context)
    assert (np.asarray(again.choices) == np.asarray(asked.choices)).all()
    assert (np.asarray(moved.choices) == 1).any(-1).all()


def test_rows_lie_in_their_lists_and_queries_find_them(rng):
    """Against loops over all tokens, with documents and picks that don't count."""
    batch, length, experts = 3, 7, 4
    pick = lambda: np.argsort(rng.random((batch, length, experts)), axis=-1)[..., :2]
    kept = jnp.asarray(rng.random((batch, length, 2)) < 0.7)
    choices = [jnp.asarray(pick()) for _ in range(2)]
    asked, stored = (
        pack_choices(choices[0], experts),
        pack_choices(choices[1], experts, kept),
    )
    tokens = jnp.arange(1, batch * length + 1, dtype=jnp.float32)[:, None]
    put, filled = list_places(stored, length)
    assert np.asarray(filled).sum() == np.asarray(kept).sum()
    rows = jnp.where(filled, gather_rows(gather_rows(tokens, stored), put), 0)
    lists = np.asarray(rows).reshape(experts, batch, length).astype(int)
    low = rng.integers(0, length, (batch, length))
    high = np.minimum(low + rng.integers(-1, 4, (batch, length)), length - 1)
    first, last = seen_places(asked, stored, (jnp.asarray(low), jnp.asarray(high)))
    for row, token in enumerate(np.asarray(asked.token_ids)):
        sample, place = divmod(int(token), length)
        expert = int(np.searchsorted(asked.group_offsets[1:], row, side="right"))
        here = np.asarray((choices[1] == expert) & kept)[sample].any(-1)
        wanted = [
            sample * length + t + 1
            for t in range(low[sample, place], high[sample, place] + 1) if here[t]
        ]  # fmt: skip
        found = lists[expert, sample][int(first[row]) : int(last[row]) + 1]
        assert list(found) == wanted


def test_costs_are_those_of_one_router_and_the_second_ones_weights():
    config = paired()
    one = dataclasses.replace(config.union, key_router=False)
    alone = dataclasses.replace(config, union=one)
    more = 32 * 4 * config.num_layers  # D x E a layer
    count = lambda c: sum(count_params(c).values())
    assert count(config) - count(alone) == more
    shapes = param_shapes(config).values()
    assert sum(s.size for s in shapes) == count(config)
    forward = lambda c: flops_per_token(c).forward
    assert forward(config) - forward(alone) == 2 * more
    assert cache_bytes(config, 2, 16) == cache_bytes(alone, 2, 16)
    # Keys and values lie in lists with a place for every token: twice X/E of them.
    kept = lambda c: activation_bytes(c, 1, 1)
    listed = config.num_kv_heads * 2 * config.head_dim * config.num_layers
    assert kept(config) - kept(alone) == listed / 2 * 4  # bytes of a number


HEADS = UnionConfig(num_experts=4, top_k=2, gated_values=True, key_router=True)
_change = lambda **changes: dataclasses.replace(HEADS, **changes)


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (UNION | {"union": _change(gated_values=False)}, "gated_values true"),
        (UNION | {"union": _change(gated_values=False, shared_kv=True)}, "everybody"),
        ({"attention": ("moh",), "union": HEADS}, "everybody"),
        ({"mlp": ("union",), "union": HEADS}, "no attention is a union"),
        (UNION | {"union": _change(router="threshold")}, "use token"),
        (UNION | {"union": _change(patch_size=2)}, "patch_size 2 is for one router"),
        (UNION | {"union": _change(least_top_k=1)}, "least_top_k 1"),
        (UNION | {"union": _change(capacity_factor=1.5)}, "capacity_factor 1.5"),
        (UNION | {"union": HEADS, "sink": True}, "sink"),
    ],
)
def test_what_a_key_router_has_no_use_for_is_refused_in_one_line(model, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        validate_model(tiny(**model))
    assert "\n" not in str(caught.value)
