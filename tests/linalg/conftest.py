"""A fresh seed each session, its planted problem, and 64-bit mode."""

import jax
import numpy as np
import pytest

from tests.linalg.planted_matrices import make_planted


@pytest.fixture(scope="session")
def seed():
    """A fresh seed; pytest prints it with any failure that uses it."""
    value = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {value}")
    return value


@pytest.fixture(scope="session")
def planted(seed):
    return make_planted(seed)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
