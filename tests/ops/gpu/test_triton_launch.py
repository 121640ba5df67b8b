from __future__ import annotations

import json
from importlib import resources

import jax
import jax.numpy as jnp
import pytest

from uoe_jax.errors import ConfigError
from uoe_jax.ops import grouped_matmul, measured, nvidia
from uoe_jax.ops.grouped_matmul.nvidia.launch import products, weight_grads
from uoe_jax.ops.grouped_matmul.nvidia.tiles import Tiles, choose_tiles


@pytest.mark.parametrize(
    ("bridge", "compiler", "fault"),
    [
        ("0.3.1", "3.6.0", None),
        ("0.4.1", "3.7.0", None),
        ("0.4.1", "3.6.0", "install jax-triton 0.3"),
        ("0.3.1", "3.7.1", "install jax-triton 0.4"),
        ("0.3.1", "3.5.0", "install jax-triton 0.3 and triton 3.6"),
        ("0.9.0", "3.6.0", "install jax-triton 0.3"),
    ],
)
def test_pair_of_releases_is_checked(bridge, compiler, fault):
    found = nvidia.pair_fault(bridge, compiler)
    if fault is None:
        assert found is None
    else:
        assert fault in found and bridge in found and compiler in found


def test_forced_backend_names_the_device_it_needs():
    x, w = jnp.zeros((4, 8)), jnp.zeros((2, 8, 4))
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU, not cpu"):
        grouped_matmul(x, w, jnp.asarray([0, 2, 4]), implementation="triton")


@pytest.mark.parametrize("kilobytes", [99, 163, 227])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("op", ["products", "weight_grads"])
@pytest.mark.parametrize(("inner", "outer"), [(2048, 2048), (72, 24), (512, 130)])
def test_tiles_outside_the_tables_fit(monkeypatch, kilobytes, dtype, op, inner, outer):
    """In shared memory, with at least two stages, and no wider than the result."""
    monkeypatch.setattr(nvidia, "shared_memory", lambda: kilobytes << 10)
    shape = {"rows": 4096, "inner": inner, "outer": outer, "dtype": dtype}
    tile = choose_tiles(op, shape)
    if op == "weight_grads":
        stage = (tile.inner + tile.outer) * tile.rows
    else:
        stage = (tile.rows + tile.outer) * tile.inner
    used = stage * tile.num_stages * jnp.dtype(dtype).itemsize
    assert tile.num_stages >= 2 and used <= kilobytes << 10
    assert tile.outer < 2 * max(outer, 16) and tile.inner < 2 * max(inner, 16)


@pytest.mark.parametrize("op", ["products", "weight_grads"])
@pytest.mark.parametrize(
    ("inner", "outer", "sides"),
    [
        (64, 64, (64, 64)),
        (40, 192, (64, 256)),
        (3, 17, (16, 32)),
        (4096, 64, (128, 64)),
    ],
)
def test_tiles_of_the_tables_are_cut_to_the_shape(monkeypatch, op, inner, outer, sides):
    """To the power of two that holds a side, from 16 on; the rest stays."""
    known = Tiles(64, 128, 256, 8, 4, 3)
    monkeypatch.setattr(measured, "tiles", lambda op, shape, **_: known._asdict())
    shape = {"rows": 4096, "inner": inner, "outer": outer, "dtype": "bfloat16"}
    want = known._replace(inner=sides[0], outer=sides[1])
    assert choose_tiles(op, shape) == want


def test_shipped_tiles_are_found_by_the_calls_they_were_measured_for(monkeypatch):
    """Every key of an entry is one that a call asks with, its words are the same."""
    asked = {"products": [], "weight_grads": []}
    ask = lambda op, shape, **_: asked[op].append(shape)
    monkeypatch.setattr(measured, "tiles", ask)
    x, w = jnp.zeros((64, 32), jnp.bfloat16), jnp.zeros((2, 32, 32), jnp.bfloat16)
    ends, ids = jnp.asarray([0, 20, 64]), jnp.arange(64)

    def call(x, w):
        for transpose in (False, True):
            for given in (None, ids):
                products(x, w, ends, given, transpose=transpose)
        for given in ((None, None), (ids, None), (None, ids)):
            weight_grads(x, x, ends, *given)

    launch = lambda kernel, *args, out_shape, **options: jnp.zeros(*out_shape)
    monkeypatch.setattr(nvidia, "launch", launch)
    with nvidia.interpreted(launch):
        jax.eval_shape(call, x, w)
    words = lambda shape: {k: v for k, v in shape.items() if isinstance(v, (bool, str))}
    path = resources.files("uoe_jax.ops") / "tuning" / "sm_90.json"
    for op, entries in json.loads(path.read_text())["tiles"].items():
        calls = asked[op]
        assert all(entry["shape"].keys() <= calls[0].keys() for entry in entries)
        for call in calls:
            assert words(call) in [words(entry["shape"]) for entry in entries]
