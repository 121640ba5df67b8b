"""Gates of what attention heads read."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compare import assert_close
from tests.model.test_cache import check_decoding
from tests.model.tiny_models import build, forward, shapes_of, tiny, tokens_like
from uoe_jax.config import HeadGroups, LayerWidths, UnionConfig
from uoe_jax.decompose.split import check_dense
from uoe_jax.errors import ConfigError
from uoe_jax.hardware.count import count_params, flops_per_token
from uoe_jax.model import param_shapes
from uoe_jax.model.context import make_context
from uoe_jax.weights import model_params

UNION = {"attention": ("union",), "mlp": ("union",)}
LAYERS = {
    "dense": {"head_groups": HeadGroups(local=2, window=4)},
    "union": UNION | {"union": UnionConfig(num_experts=4, top_k=2, patch_size=2)},
    "two heads an expert": UNION
    | {"union": UnionConfig(num_experts=2, top_k=1, gated_values=True)},
    "shared keys": UNION
    | {"union": UnionConfig(num_experts=4, top_k=2, shared_kv=True)},
    "moh": {"attention": ("moh",)},
    "moba": {"attention": ("moba",)},
    "narrow": {"widths": LayerWidths(key_dim=(4, 6), value_dim=(3, 8))},
    "threshold": UNION | {"union": UnionConfig(num_experts=4, router="threshold")},
}


@pytest.mark.parametrize("name", LAYERS)
def test_decoding_equals_the_full_forward(name):
    model = build(tiny(output_gate=True, **LAYERS[name]))
    tokens = tokens_like(model.config, 2, 12, seed=1)
    lengths = jnp.array([6, 1])
    check_decoding(model, tokens, lengths, 6)


@pytest.mark.parametrize("kind", ["dense", "union"])
def test_gates_of_zero_weights_are_the_model_without_them(kind):
    plain = build(tiny(attention=(kind,), use_bias=True))
    config = dataclasses.replace(plain.config, output_gate=True)
    weights = dict(nnx.to_flat_state(nnx.state(plain, nnx.Param)))
    graphdef, params, rest = shapes_of(config)
    flat = [
        (path, weights.get(path, variable.replace(jnp.zeros(variable.shape))))
        for path, variable in nnx.to_flat_state(params)
    ]
    rest = nnx.split(plain, nnx.Param, ...)[2] if kind == "union" else rest
    model = nnx.merge(graphdef, nnx.from_flat_state(flat), rest)
    tokens = tokens_like(config, 2, 12, seed=1)
    assert_close(forward(model, tokens)[0], forward(plain, tokens)[0], 1e-6)


def test_a_gate_multiplies_what_its_head_reads():
    """Heads one by one: their part of the output, by hand."""
    config = tiny(num_layers=1, output_gate=True)
    layer = jax.tree.map(lambda a: a[0], build(config).trunk.blocks[0].attention)
    x = jax.random.normal(jax.random.key(0), (2, 7, 32))
    context = make_context(config, (2, 7))
    heads, _ = layer.attend_heads(x, context)
    scores = np.einsum("btd,djg->btjg", x, layer.wg[...][0]).reshape(2, 7, 8)
    gates = 2 / (1 + np.exp(-scores))
    gated = np.asarray(heads) * gates[..., None]
    wanted = np.einsum("btqh,qhd->btd", gated, layer.wo[...].reshape(8, 8, 32))
    assert_close(layer(x, context)[0], wanted, 1e-5)
    assert gates.std() > 0.1


def test_the_counts_are_those_of_the_arrays_and_cuts_refuse_it():
    config = tiny(output_gate=True, **UNION)
    found = {key: leaf.shape for key, leaf in param_shapes(config).items()}
    assert found == {key: p.shape for key, p in model_params(config).items()}
    assert sum(count_params(config).values()) == sum(map(math.prod, found.values()))
    plain = tiny(**UNION)
    counts = [flops_per_token(c, 12).parts for c in (config, plain)]
    more = [n["attention projections"] for n in counts]
    assert more[0] - more[1] == 2 * 2 * 32 * 8 / 2  # half of the heads are used
    with pytest.raises(ConfigError, match="has model.output_gate"):
        check_dense(tiny(output_gate=True))
