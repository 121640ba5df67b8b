"""Only unions whose gates are all 1 are what a dense file holds."""

import numpy as np
import pytest

from tests.model.tiny_models import tiny
from uoe_jax.config import UnionConfig
from uoe_jax.errors import ConfigError
from uoe_jax.interop.exporting import check_gates

NAME = "trunk.blocks.0.mlp.router"


@pytest.mark.parametrize(
    ("router", "gate", "bias", "problem"),
    [
        ("token", "sigmoid", 1.0, None),  # which chooses, and is in no gate
        ("threshold", "sigmoid", 0.0, None),
        ("threshold", "straight_through", 1.0, None),
        ("threshold", "sigmoid", 1.0, "router.bias isn't zero"),
        ("threshold", "relu", 0.0, "gate relu is 0 at score 0"),
    ],
)
def test_gates_that_are_not_one_are_refused(router, gate, bias, problem):
    union = UnionConfig(num_experts=4, top_k=4, router=router, gate=gate)
    params = {f"{NAME}.weight": np.zeros((1, 32, 4))}
    call = tiny(mlp=("union",), union=union), params, {f"{NAME}.bias": np.full(4, bias)}
    if problem is None:
        check_gates(*call)
        return
    with pytest.raises(ConfigError, match=problem) as caught:
        check_gates(*call)
    assert "\n" not in str(caught.value)
