"""Values of routed attention times the gates of their own keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compare import assert_close
from tests.model.test_cache import check_decoding
from tests.model.tiny_models import (
    assert_is_dense_when_cut,
    build,
    tiny,
    tokens_like,
)
from uoe_jax.config import UnionConfig
from uoe_jax.errors import ConfigError
from uoe_jax.model.attention import UnionAttention
from uoe_jax.model.context import make_context
from uoe_jax.validation import validate_model

UNION = {"attention": ("union",), "mlp": ("union",)}


def gated(**options):
    union = UnionConfig(num_experts=4, gated_values=True, **options)
    return tiny(**UNION, union=union)


def test_all_experts_with_unit_gates_are_the_dense_model():
    assert_is_dense_when_cut(gated(top_k=4))


def test_the_output_is_that_of_every_head_by_hand():
    config = dataclasses.replace(gated(top_k=2), num_layers=1)
    block = build(config).trunk.blocks[0]
    layer: UnionAttention = jax.tree.map(lambda a: a[0], block.attention)
    x = jax.random.normal(jax.random.key(0), (1, 7, 32))
    context = make_context(config, (1, 7))
    routing = layer.router(x, context)
    gates = np.zeros((7, 4))
    choices = np.asarray(routing.choices)[0]
    np.put_along_axis(gates, choices, np.asarray(routing.gates)[0], axis=1)
    wanted = np.zeros((7, 32))
    for expert in range(4):
        here = np.flatnonzero((choices == expert).any(1))
        rows = np.asarray(x[0, here])
        positions = jnp.asarray(here)
        q = np.einsum("td,djgh->tjgh", rows, layer.wq[...][expert])
        k = np.einsum("td,djh->tjh", rows, layer.wk[...][expert])
        q = layer.settle(jnp.asarray(q[:, 0]), None, positions)
        k = layer.settle(jnp.asarray(k), None, positions)[:, 0]
        v = np.einsum("td,djh->tjh", rows, layer.wv[...][expert])[:, 0]
        v = v * gates[here, expert, None]
        scores = np.einsum("tgh,sh->gts", q, k) / 8**0.5
        scores = np.where(np.tri(len(here), dtype=bool)[None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        heads = np.einsum("gts,sh->tgh", weights, v)
        out = np.einsum("tgh,ghd->td", heads, layer.wo[...][expert][0])
        wanted[here] += out * gates[here, expert, None]
    assert_close(layer(x, context)[0][0], wanted, 1e-5)


@pytest.mark.parametrize("batch", [2, 9])
def test_decoding_equals_the_full_forward_by_pick_and_by_table(batch):
    """A few rows read the weights of their picks, many those of all experts."""
    config = gated(top_k=2, gate="softmax", patch_size=2)
    model = build(config)
    tokens = tokens_like(config, batch, 12, seed=2)
    lengths = jnp.array([5, 2, 1, 6, 3, 4, 2, 1, 6])[:batch]
    check_decoding(model, tokens, lengths, 6)


class Fixed:
    """A router whose routing is given."""

    varies = False

    def __init__(self, router, routing):
        self.pack, self.num_experts = router.pack, router.num_experts
        self.routing = routing

    def __call__(self, x, context):
        return self.routing


@pytest.mark.parametrize("option", [True, False])
def test_an_earlier_token_says_how_much_later_ones_read_of_it(option):
    config = dataclasses.replace(gated(top_k=4), num_layers=1)
    union = dataclasses.replace(config.union, gated_values=option)
    layer = build(dataclasses.replace(config, union=union)).trunk.blocks[0].attention
    layer = jax.tree.map(lambda a: a[0], layer)
    x = jax.random.normal(jax.random.key(1), (1, 7, 32))
    context = make_context(config, (1, 7))
    fixed = Fixed(layer.router, layer.router(x, context))
    layer.router = fixed
    before = layer(x, context)[0]
    gates = fixed.routing.gates
    fixed.routing = fixed.routing._replace(gates=gates.at[0, 2].multiply(2.0))
    moved = np.abs(np.asarray(layer(x, context)[0] - before))[0].max(-1)
    assert (moved[:2] == 0).all() and moved[2] > 1e-3
    assert (moved[3:] > 1e-3).all() if option else (moved[3:] == 0).all()


HEADS = UnionConfig(num_experts=4, gated_values=True)


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (UNION | {"union": dataclasses.replace(HEADS, shared_kv=True)}, "everybody"),
        ({"attention": ("moh",), "union": HEADS}, "everybody"),
        ({"mlp": ("union",), "union": HEADS}, "no attention is a union"),
    ],
)
def test_values_without_gates_are_refused_in_one_line(model, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        validate_model(tiny(**model))
    assert "\n" not in str(caught.value)
