"""In training too, how much padding follows a sample changes nothing."""

import jax
import jax.numpy as jnp
import pytest

from tests.compare import assert_close
from tests.model.router_kinds import config_of
from tests.model.tiny_models import build, tokens_like
from uoe_jax.model.context import make_context


@jax.jit
def hidden(model, tokens, segments):
    context = make_context(model.config, tokens.shape, segments=segments, train=True)
    return model.trunk(model.embed(tokens, context.positions), context)[0]


@pytest.mark.parametrize("name", ["capacity", "mod", "expert choice"])
def test_room_follows_the_tokens_not_the_padding(name):
    model = build(config_of("encoder", name))
    tokens = tokens_like(model.config, 8, 12, seed=5)
    real = (jnp.arange(12) < 6).astype(jnp.int32)[None] * jnp.ones((8, 1), jnp.int32)
    short = hidden(model, tokens[:, :6], real[:, :6])
    long = hidden(model, tokens, real)[:, :6]
    assert_close(short, long, 1e-5)
