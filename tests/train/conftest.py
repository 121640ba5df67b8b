"""Shared folders, and one compilation of each program for all tests."""

import functools
import os

import jax
import pytest
from tiny_runs import make_tiny


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """One folder for all workers of this test run."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="package", autouse=True)
def compiled(shared_folder):
    """Compile every program once and without optimising: most of these tests' time.

    Returns the folder of programs that this process or another one compiled.
    """
    folder = shared_folder / "compiled"
    cache = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in cache}
    for name, value in cache.items():
        jax.config.update(name, value)
    jax.config.update("jax_disable_most_optimizations", True)
    yield folder
    jax.config.update("jax_disable_most_optimizations", False)
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def tiny(shared_folder):
    """`make_tiny` with data prepared once."""
    return functools.partial(make_tiny, cache_dir=shared_folder / "prepared")
