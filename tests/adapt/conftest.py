"""Adapters that change their weights."""

import pytest

from tests.adapt.moved_adapters import move_adapters


@pytest.fixture
def make():
    """`make(params, config, seed)`: an adapter that changes its weights."""
    return move_adapters
