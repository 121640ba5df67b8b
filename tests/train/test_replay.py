"""A bit of a gradient that flips on one device is found by computing it twice."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from tests.train.test_loop import assert_same_bits, lines_of, shared_programs
from tests.train.tiny_runs import make_tiny, with_train
from uoe_jax.config import MeshConfig
from uoe_jax.errors import ReplayError
from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.train import loop, replay, train
from uoe_jax.train.replay import checksum
from uoe_jax.tree import leaf_name

shared_programs = shared_programs  # the fixture, for this module too
TENSOR = "trunk.blocks.0.mlp.w_up"


def flip_one_bit(monkeypatch, device, call, bit=3, tensor=TENSOR):
    """Let one device's gradient of a tensor differ by one bit of its mantissa."""
    real, calls = replay.local_gradients, Counter()

    def flip(index):
        calls[int(index)] += 1
        now = int(index) == device and calls[int(index)] == call
        return np.uint32(1 << bit if now else 0)

    def broken(*args):
        grads, found, count = real(*args)
        index = jnp.int32(0)
        layout = args[5]
        for axis, size in layout.mesh.shape.items():
            index = index * size + jax.lax.axis_index(axis)
        mask = io_callback(flip, jax.ShapeDtypeStruct((), jnp.uint32), index)

        def change(path, grad):
            if leaf_name(path) != tensor:
                return grad
            bits = jax.lax.bitcast_convert_type(grad, jnp.uint32)
            where = jax.lax.broadcasted_iota(jnp.int32, (bits.size, 1), 0)
            here = (where.reshape(bits.shape) == bits.size // 2).astype(jnp.uint32)
            return jax.lax.bitcast_convert_type(bits ^ here * mask, jnp.float32)

        return jax.tree_util.tree_map_with_path(change, grads), found, count

    monkeypatch.setattr(replay, "local_gradients", broken)
    return calls


def test_any_flipped_bit_changes_the_checksum(rng):
    array = rng.normal(size=(7, 33)).astype(np.float32)
    first = int(checksum(array))
    for bit in range(32):
        place = rng.integers(array.size)
        bits = array.view(np.uint32).copy()
        bits.reshape(-1)[place] ^= np.uint32(1) << np.uint32(bit)
        assert int(checksum(bits.view(np.float32))) != first
    assert int(checksum(array[:, ::-1])) != first
    assert int(checksum(array.copy())) == first


@pytest.mark.parametrize("device", [0, 5])
def test_a_flipped_bit_is_named_with_step_device_and_tensor(
    tiny, tmp_path, monkeypatch, device
):
    # Steps 4 and 8 are repeated; the second time of step 8 is the fourth call.
    calls = flip_one_bit(monkeypatch, device, call=4)
    config = tiny("union", attention="dense", replay_every=4, save_every=3)
    with pytest.raises(ReplayError) as error:
        train(config, tmp_path, quiet=True)
    text = str(error.value)
    kind = jax.devices()[device].device_kind
    assert text.startswith("step 8: ") and f"on {kind} {device} in {TENSOR};" in text
    assert "\n" not in text and error.value.exit_code == 1
    assert calls[device] == 4
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == 6
    assert [line["step"] for line in lines_of(tmp_path, "train")] == [*range(1, 8)]
    monkeypatch.undo()
    train(with_train(config, steps=9), tmp_path, quiet=True)
    assert [line["step"] for line in lines_of(tmp_path, "train")] == [*range(1, 10)]


def test_the_parts_of_a_model_that_is_split_are_named(tiny, tmp_path, monkeypatch):
    flip_one_bit(monkeypatch, 6, call=2)
    config = tiny("union", attention="dense", replay_every=1)
    config = dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    with pytest.raises(ReplayError, match=f"step 1: .* 6 in {TENSOR};"):
        train(config, tmp_path, quiet=True)


def test_repeating_changes_no_number(tiny, tmp_path, capsys):
    config = tiny("union", attention="dense", accumulate=1)
    train(config, tmp_path / "plain", quiet=True)
    train(with_train(config, replay_every=3), tmp_path / "run", quiet=True)
    assert_same_bits(tmp_path / "plain", tmp_path / "run")
    assert lines_of(tmp_path / "plain") == lines_of(tmp_path / "run")


def test_without_the_option_nothing_is_made(tiny, tmp_path, monkeypatch):
    def made(*args):
        raise AssertionError("made")

    monkeypatch.setattr(loop, "make_replay", made)
    assert make_tiny().train.replay_every == 0
    train(tiny(steps=1), tmp_path, quiet=True)
