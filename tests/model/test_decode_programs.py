"""How long the programs of generation are: not longer for a deeper model."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.model.tiny_models import build, tiny, union
from uoe_jax.config import UnionConfig
from uoe_jax.model import init_cache
from uoe_jax.model.decoding.step import prepare

CONFIGS = {
    "dense": tiny(activation="swiglu", scan_layers=False),
    "union": union(union=UnionConfig(num_experts=4, top_k=2), scan_layers=False),
}


def programs(config):
    """Lines of the prompt's program and of a token's."""
    model = build(config)
    cache = init_cache(config, 2, 12)
    tokens = jnp.zeros((2, 8), jnp.int32)
    lengths = jnp.array([8, 3])
    prefill = jax.jit(lambda m, t, n, c: m.prefill(t, n, c))
    decode = jax.jit(lambda d, t, c: d.decode(t, c))
    lowered = (
        prefill.lower(model, tokens, lengths, cache),
        decode.lower(prepare(model, 2), lengths, cache),
    )
    return [len(program.as_text().splitlines()) for program in lowered]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_deeper_model_has_no_longer_programs_on_a_cpu(name):
    """Whatever the config says of training: 12 layers compiled 9 times as long."""
    config = CONFIGS[name]
    assert not config.scan_layers
    few, many = (
        programs(dataclasses.replace(config, num_layers=layers)) for layers in (2, 8)
    )
    assert few == many
