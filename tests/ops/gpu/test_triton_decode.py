"""What the kernels of single tokens take; their values are of tests/ops/suite.py."""

from __future__ import annotations

from tests.ops.gpu import triton_on_cpu  # before anything that imports triton

# isort: split
import jax.numpy as jnp
import pytest

from uoe_jax.errors import ConfigError
from uoe_jax.ops import nvidia
from uoe_jax.ops.cache_attention.nvidia import triton as attention
from uoe_jax.ops.token_products.api import Projection, project


@pytest.fixture(autouse=True)
def on_cpu():
    with nvidia.interpreted(triton_on_cpu.run):
        yield


def test_a_log_is_shared_out_to_fill_the_device():
    assert attention.shares(5120, 128, 1, 132) == (256, 20)
    assert attention.shares(5120, 128, 32, 132) == (640, 8)
    assert attention.shares(640, 64, 16, 132) == (128, 5)
    assert attention.shares(640, 64, 512, 132) == (640, 1)


def test_what_it_cannot_serve_is_named():
    with pytest.raises(ConfigError, match="2 rows share the weights of one expert"):
        project(
            jnp.zeros((2, 8)),
            Projection(jnp.zeros((1, 1, 4, 8))),
            implementation="triton",
        )
