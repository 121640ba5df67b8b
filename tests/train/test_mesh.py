import pytest

from uoe_jax.config import MeshConfig
from uoe_jax.errors import ConfigError
from uoe_jax.partition.mesh import make_mesh


def test_zero_takes_every_device():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 8}
    assert dict(make_mesh(MeshConfig(data=2)).shape) == {"data": 2}


def test_too_many_devices_is_refused():
    with pytest.raises(ConfigError, match="mesh.data is 9 but 8 devices are visible"):
        make_mesh(MeshConfig(data=9))


def test_a_batch_that_does_not_divide_says_what_would():
    with pytest.raises(ConfigError, match=r"use mesh.data 1 or 2 or 3 or 6, .* of 8"):
        make_mesh(MeshConfig(), batch_size=6)
    assert make_mesh(MeshConfig(data=3), batch_size=6).size == 3
