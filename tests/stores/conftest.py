"""A store for each test, and a cache of copies."""

import pytest

from tests.stores import bucket  # noqa: F401  registers bucket://
from uoe_jax.runs import store_lock
from uoe_jax.stores.mirror import _MIRRORS


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The folder in which `bucket://b/...` lies."""
    folder = tmp_path / "buckets"
    folder.mkdir()
    monkeypatch.setenv("TEST_BUCKETS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(store_lock, "SETTLE_SECONDS", 0.2)  # nothing is slow here
    _MIRRORS.clear()  # of other buckets
    yield folder
    _MIRRORS.clear()
