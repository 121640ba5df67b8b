"""Folders that all workers of a test run share."""

import functools
import os

import pytest

from tests.train.tiny_runs import make_tiny


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """One folder for all workers of this test run."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def tiny(shared_folder):
    """`make_tiny` with data prepared once."""
    return functools.partial(make_tiny, cache_dir=shared_folder / "prepared")
