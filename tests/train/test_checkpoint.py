import re
import resource
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uoe_jax.errors import CheckpointError
from uoe_jax.runs import integrity
from uoe_jax.runs.checkpoint import Checkpoints, snapshot
from uoe_jax.tree import fill_leaves, named_leaves

pytestmark = pytest.mark.both_jax

FIXED = np.random.default_rng(0)  # what is saved is only carried
TREE = {
    "params": {"wq": jnp.asarray(FIXED.normal(size=(8, 16)), jnp.float32)},
    "half": jnp.asarray(FIXED.normal(size=(4, 4)), jnp.bfloat16),
    "step": jnp.int32(7),
}


def saved(tmp_path, steps=(1, 2), keep=3, tree=TREE):
    store = Checkpoints(tmp_path, keep=keep)
    for step in steps:
        store.save(step, snapshot(tree), {"name": "x"}, {"seconds": float(step)})
    store.close()
    return Checkpoints(tmp_path, keep=keep)


def test_restored_arrays_are_bitwise_those_saved(tmp_path):
    step, arrays, progress = saved(tmp_path).restore(named_leaves(TREE))
    assert (step, progress) == (2, {"seconds": 2.0})
    restored = fill_leaves(TREE, arrays)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, TREE)
    bits = lambda tree: {name: a.tobytes() for name, a in snapshot(tree).items()}
    assert bits(restored) == bits(TREE)


def test_a_part_of_the_arrays_can_be_restored(tmp_path):
    template = {"params.wq": TREE["params"]["wq"]}
    _, arrays, _ = saved(tmp_path).restore(template)
    assert list(arrays) == ["params.wq"]


def test_only_the_newest_are_kept(tmp_path):
    store = saved(tmp_path, steps=(1, 2, 3, 4), keep=2)
    assert store.steps() == [3, 4]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["3", "4"]


def data_files(folder):
    return [
        p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size > 0
    ]


def flip(rng, path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def test_a_flipped_bit_anywhere_is_refused_and_its_file_named(tmp_path, rng):
    store = saved(tmp_path)
    for path in data_files(tmp_path / "2"):
        original = path.read_bytes()
        flip(rng, path, int(rng.integers(len(original))))
        with pytest.raises(CheckpointError, match=re.escape(str(path))) as error:
            store.restore(named_leaves(TREE))
        assert "step 1 is intact: continue with --resume-step 1" in str(error.value)
        assert "\n" not in str(error.value)
        path.write_bytes(original)
    assert store.restore(named_leaves(TREE))[0] == 2


def test_a_damaged_array_is_named(tmp_path, rng):
    store = saved(tmp_path)
    for name in ("params.wq", "half"):
        folder = tmp_path / "2" / "state" / name
        path = max(folder.iterdir(), key=lambda p: p.stat().st_size)
        flip(rng, path, path.stat().st_size - 1)
        with pytest.raises(CheckpointError, match=f"array {name}"):
            store.restore(named_leaves(TREE))


@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_truncated_and_missing_files_are_refused(tmp_path, damage):
    store = saved(tmp_path)
    for path in data_files(tmp_path / "2"):
        if path.name == integrity.MANIFEST:
            continue
        original = path.read_bytes()
        if damage == "truncate":
            path.write_bytes(original[:-1])
        else:
            path.unlink()
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            store.restore(named_leaves(TREE))
        path.write_bytes(original)


def test_damage_behind_the_files_is_caught_by_the_arrays(tmp_path):
    arrays = snapshot(TREE)
    manifest = {"arrays": integrity.describe_arrays(arrays)}
    assert integrity.check_arrays(arrays, manifest) == []
    arrays["half"].reshape(-1).view(np.uint8)[3] ^= 1
    (problem,) = integrity.check_arrays(arrays, manifest)
    assert "array half" in problem


def test_no_older_step_is_offered_when_none_is_intact(tmp_path, rng):
    store = saved(tmp_path)
    for step in ("1", "2"):
        flip(rng, tmp_path / step / "state" / "params.wq" / "0.0", 5)
    with pytest.raises(CheckpointError, match="no older step is intact"):
        store.restore(named_leaves(TREE))


def test_an_older_step_can_be_asked_for_and_newer_ones_go_at_the_next_save(tmp_path):
    store = saved(tmp_path, steps=(1, 2, 4))
    assert store.restore(named_leaves(TREE), step=1)[0] == 1
    assert store.newer_than(1) == [2, 4] and store.steps() == [1, 2, 4]
    store.save(3, snapshot(TREE), {}, {})
    store.close()
    assert store.steps() == [1, 2, 3]
    with pytest.raises(CheckpointError, match="has no step 9; it has 1"):
        store.restore(named_leaves(TREE), step=9)


def test_unfinished_steps_are_ignored_and_removed(tmp_path):
    store = saved(tmp_path)
    (tmp_path / "2" / integrity.MANIFEST).unlink()
    (tmp_path / "3.orbax-checkpoint-tmp-5").mkdir()
    assert store.restore(named_leaves(TREE))[0] == 1
    assert store.discard_unfinished() == [2, 3]
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["1"]


def test_other_shapes_are_listed_with_both(tmp_path):
    store = saved(tmp_path)
    template = {
        **named_leaves(TREE),
        "params.wq": jnp.zeros((8, 4)),
        "new": jnp.ones(2),
    }
    with pytest.raises(CheckpointError) as error:
        store.restore(template)
    assert "params.wq is [8, 16], expected [8, 4]" in str(error.value)
    assert "new is absent, expected [2]" in str(error.value)


def test_nothing_there_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint; train first"):
        Checkpoints(tmp_path / "none").restore({})


def test_snapshot_survives_donation():
    x = jnp.arange(8.0)
    copies = snapshot({"x": x})
    jax.jit(lambda a: a + 1, donate_argnums=0)(x).block_until_ready()
    np.testing.assert_array_equal(copies["x"], np.arange(8.0))


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, rng):
    store = Checkpoints(tmp_path, keep=1)
    big = {"w": jnp.asarray(rng.normal(size=(256, 256)), jnp.float32)}
    store.save(1, snapshot(big), {}, {})
    store.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Writing past the limit fails as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        store.save(2, snapshot(big), {}, {})
        store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (failure,) = store.poll()
    assert failure.startswith("saving step 2 into ") and " failed: " in failure
    assert store.poll() == []
    assert store.steps() == [1]
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["1"]
    with pytest.raises(CheckpointError, match="step 1 is the newest kept"):
        store.close()


def fail(*args):
    raise OSError("no space left on device")


def test_a_later_good_save_forgives_a_failed_one(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            store, "_write", lambda *a: (_ for _ in ()).throw(OSError("full"))
        )
        store.save(1, snapshot(TREE), {}, {})
        store.wait()
    store.save(2, snapshot(TREE), {}, {})
    store.close()
    assert store.steps() == [2]


class Watched(np.ndarray):
    """An array that knows whether it was copied."""

    copies: ClassVar[list[tuple[int, ...]]] = []

    def __deepcopy__(self, memo):
        self.copies.append(self.shape)
        return np.array(self)


def test_a_save_holds_no_second_copy_of_the_arrays(tmp_path, rng):
    given = {f"params.{n}": rng.normal(size=(n, 7)).astype(np.float32) for n in (3, 40)}
    given["step"] = np.array(4, np.int32)
    store = Checkpoints(tmp_path / "checkpoints")
    store.save(4, {k: v.view(Watched) for k, v in given.items()}, {}, {})
    store.close()
    assert not Watched.copies
    _, found, _ = store.restore(given, step=4)
    for name, array in given.items():
        assert found[name].tobytes() == array.tobytes()
