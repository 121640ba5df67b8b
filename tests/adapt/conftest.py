"""Adapters that change their weights."""

import jax
import pytest
from moved_adapters import randomise

from uoe_jax.adapt import init_adapters


@pytest.fixture
def make():
    """`make(params, config, seed)`: an adapter that changes its weights."""

    def make(params, config, seed=0, **options):
        fresh = init_adapters(params, config, jax.random.key(seed), **options)
        return randomise(fresh, seed)

    return make
