"""The causal convolution before attention and its router."""

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
from uoe_jax.config import ExperimentConfig, HeadGroups, MeshConfig, UnionConfig
from uoe_jax.errors import ConfigError
from uoe_jax.hardware.count import cache_bytes, count_params, flops_per_token
from uoe_jax.model import init_cache, param_shapes
from uoe_jax.model.context import make_context
from uoe_jax.model.convolution import Convolution
from uoe_jax.partition.legal import layout_problems
from uoe_jax.validation import validate_model
from uoe_jax.weights import model_params

UNION = {"attention": ("union",), "mlp": ("union",)}
LAYERS = {
    "dense": {},
    "union": UNION | {"union": UnionConfig(num_experts=4, top_k=2, patch_size=3)},
    "selection": UNION
    | {
        "union": UnionConfig(num_experts=4, top_k=2, router="selection", segment_size=3)
    },
    "moh": {"attention": ("moh",)},
    "moba": {"attention": ("moba",)},
    "groups": {"head_groups": HeadGroups(local=2, window=4)},
    "post": {"norm_place": "post", "window": (5, 0), "use_bias": True},
}


def test_it_is_the_sum_over_the_document_in_float64():
    with jax.enable_x64(True):
        draw = np.random.default_rng(0)
        layer = Convolution(tiny(convolution=4))
        weight, x = draw.normal(size=(4, 32)), draw.normal(size=(2, 9, 32))
        layer.weight = nnx.Param(jnp.asarray(weight))
        segments = jnp.array([[1] * 4 + [2] * 5, [1] * 6 + [0] * 3])
        context = make_context(tiny(), (2, 9), segments=segments)
        found = layer(jnp.asarray(x), context)
        documents = np.asarray(segments)
        for row in range(2):
            for t in range(9):
                wanted = x[row, t].copy()
                for j in range(4):
                    if t >= j and documents[row, t - j] == documents[row, t]:
                        wanted += weight[j] * x[row, t - j]
                np.testing.assert_allclose(found[row, t], wanted, atol=1e-12)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_convolution_of_zeros_is_the_model_without_it(kind):
    plain = build(tiny(kind=kind))
    config = dataclasses.replace(plain.config, convolution=4)
    weights = dict(nnx.to_flat_state(nnx.state(plain, nnx.Param)))
    graphdef, params, rest = shapes_of(config)
    flat = [
        (path, weights.get(path, variable.replace(jnp.zeros(variable.shape))))
        for path, variable in nnx.to_flat_state(params)
    ]
    model = nnx.merge(graphdef, nnx.from_flat_state(flat), rest)
    tokens = tokens_like(config, 2, 12, seed=1)
    segments = jnp.array([[1] * 7 + [2] * 5, [1] * 9 + [0] * 3])
    wanted = forward(plain, tokens, segments=segments)[0]
    found = forward(model, tokens, segments=segments)[0]
    assert_close(found, wanted, 1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_decoding_equals_the_full_forward(name):
    config = tiny(convolution=4, **LAYERS[name])
    model = build(config)
    tokens = tokens_like(config, 3, 12, seed=1)
    lengths = jnp.array([6, 1, 3])  # under three tokens there are zeros before them
    check_decoding(model, tokens, lengths, 6)


def test_the_router_reads_its_neighbours():
    config = tiny(num_layers=1, convolution=3, **UNION)
    model = build(config)
    tokens = tokens_like(config, 4, 12, seed=3)
    changed = tokens.at[:, 5].set((tokens[:, 5] + 7) % 61)
    choices = [
        forward(model, t)[1]["attention"]["choices"][0] for t in (tokens, changed)
    ]
    moved = np.any(np.asarray(choices[0] != choices[1]), axis=(0, 2))
    assert set(np.flatnonzero(moved)) <= {5, 6, 7} and moved[6:8].any()


def test_the_counts_are_those_of_the_arrays():
    config = tiny(convolution=4, head_groups=HeadGroups(local=2, window=4), **UNION)
    found = {key: leaf.shape for key, leaf in param_shapes(config).items()}
    assert found == {key: p.shape for key, p in model_params(config).items()}
    counts = count_params(config)
    assert sum(counts.values()) == sum(map(math.prod, found.values()))
    assert counts["convolution"] == 2 * 4 * 32
    cache = jax.tree_util.tree_leaves_with_path(init_cache(config, 2, 12).layers)
    names = ("k", "v", "tokens")
    bytes_ = sum(leaf.nbytes for path, leaf in cache if path[-1].key in names)
    assert cache_bytes(config, 2, 12) == bytes_
    assert flops_per_token(config, 12).parts["convolution"] == 2 * 2 * 4 * 32


def test_convolutions_that_cannot_be_are_one_line():
    with pytest.raises(ConfigError, match="convolution is 1, which mixes no other"):
        validate_model(tiny(convolution=1))
    with pytest.raises(ConfigError, match="convolution is 4 with 'mod' blocks"):
        validate_model(tiny(convolution=4, blocks=("mod",)))
    with pytest.raises(ConfigError, match="is 65; it must be 0 to 64"):
        validate_model(tiny(convolution=65))
    config = ExperimentConfig(
        model=tiny(convolution=4, max_seq_len=16), mesh=MeshConfig(sequence=8)
    )
    sizes = {"data": 1, "fsdp": 1, "sequence": 8, "tensor": 1}
    (problem,) = [p for p in layout_problems(config, sizes) if "convolution" in p]
    assert "leaves a device 2 tokens" in problem and "use at most 4" in problem
