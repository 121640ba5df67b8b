"""What `split_heads` refuses; its values are of tests/ops/suite.py."""

import jax.numpy as jnp
import pytest

from uoe_jax.errors import ConfigError
from uoe_jax.ops import split_heads

pytestmark = pytest.mark.both_jax


@pytest.mark.parametrize(
    ("width", "options", "part"),
    [
        (16, {}, "need a multiple of 12"),
        (18, {}, "need a multiple of 12"),
        (16, {"theta": None}, "need a multiple of 6"),
        (24, {"groups": 0}, "groups 0; both must be at least 1"),
    ],
)
def test_rows_of_no_whole_heads_are_refused(width, options, part):
    zeros = jnp.zeros(4, jnp.int32)
    options = {"kv_heads": 2, "groups": 1, "theta": 100.0} | options
    with pytest.raises(ConfigError, match=part):
        split_heads(jnp.zeros((4, width)), zeros, zeros, **options)
