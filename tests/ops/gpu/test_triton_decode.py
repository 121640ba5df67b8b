"""The kernels of single tokens, in triton's interpreter."""

from __future__ import annotations

from tests.ops.gpu import triton_on_cpu  # before anything that imports triton

# isort: split
import jax.numpy as jnp
import pytest

from tests.ops.decode_oracle import check_add, check_attend, check_project, check_route
from tests.ops.test_decode_ops import ADD, ATTEND, PROJECT, ROUTE
from uoe_jax.errors import ConfigError
from uoe_jax.ops import nvidia
from uoe_jax.ops.cache_attention import triton as attention
from uoe_jax.ops.token_products import triton as products
from uoe_jax.ops.token_products.api import Projection, project

# Of scores that no row has, and of gates that are shut; GPUs say nothing.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def on_cpu():
    with nvidia.interpreted(triton_on_cpu.run):
        yield


@pytest.mark.parametrize("case", PROJECT)
def test_project_matches_float64(case):
    check_project(case, "triton")


@pytest.mark.parametrize("case", ADD)
def test_add_matches_float64(case, monkeypatch):
    monkeypatch.setattr(products, "ADD_INPUTS", 32)  # more than one piece of inputs
    check_add(case, "triton")


@pytest.mark.parametrize("case", ROUTE)
def test_route_matches_float64(case):
    check_route(case, "triton")


@pytest.mark.parametrize("case", ATTEND)
@pytest.mark.parametrize("block", [16, 32])
def test_attention_matches_float64_and_writes_the_token(case, block, monkeypatch):
    # Small blocks: logs of several, shared out among programs and not.
    monkeypatch.setattr(attention, "BLOCK", block)
    monkeypatch.setattr(attention, "LOG_BLOCK", block)
    monkeypatch.setattr(attention, "LEAST_BLOCKS", 1 if block == 16 else 100)
    check_attend(case, "triton", unwritten=float("nan"))


def test_bfloat16_is_rounded_as_plain_jax_rounds_it():
    check_project(PROJECT[2], "triton", jnp.bfloat16, 2.0**-7)
    check_add(ADD[2], "triton", jnp.bfloat16, 2.0**-6)
    check_attend(ATTEND[2], "triton", jnp.bfloat16, 2.0**-6)


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
