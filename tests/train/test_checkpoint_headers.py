"""An array's own header can't make a restore take more memory than the array has."""

from __future__ import annotations

import json

import jax.numpy as jnp
import pytest

from uoe_jax.errors import CheckpointError
from uoe_jax.runs import integrity
from uoe_jax.runs.checkpoint import Checkpoints, snapshot
from uoe_jax.tree import named_leaves

TREE = {"wq": jnp.ones((8, 16)), "step": jnp.int32(7)}


@pytest.fixture
def store(tmp_path):
    made = Checkpoints(tmp_path)
    made.save(1, snapshot(TREE), {"name": "x"}, {"seconds": 1.0})
    made.close()
    return Checkpoints(tmp_path)


def test_honest_headers_pass(store):
    assert store.restore(named_leaves(TREE))[0] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [10**9, 10**9]},
        {"shape": [8, 16, 1]},
        {"chunks": [10**9, 10**6]},
        {"chunks": [0, 16]},
        {"chunks": [-8, -16]},
        {"chunks": [8]},
        {"shape": "many"},
        {"shape": None},
        None,
    ],
)
def test_hostile_headers_are_refused_by_array(store, change):
    step = store.folder / "1"
    header = step / "state" / "wq" / ".zarray"
    content = "[" * 70_000
    if change is not None:
        content = json.dumps(json.loads(header.read_text()) | change)
    header.write_text(content)
    # Whoever made the file made its checksums too.
    arrays = integrity.read_manifest(step)["arrays"]
    integrity.write_manifest(step, arrays, step=1)
    with pytest.raises(CheckpointError) as caught:
        store.restore(named_leaves(TREE))
    said = str(caught.value)
    assert "(array wq)" in said and ".zarray" in said and "\n" not in said
