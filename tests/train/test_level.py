"""A loss that jumps out of its running level: left out, told, and not learned from."""

import itertools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compare import assert_close
from tests.train.test_loop import assert_same_bits, lines_of, shared_programs
from tests.train.test_step import changed, make_batch, run_steps
from tests.train.tiny_runs import make_tiny, with_train
from uoe_jax.config import TrainConfig
from uoe_jax.errors import ConfigError
from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.runs.state import first_level
from uoe_jax.train import level as levels
from uoe_jax.train import loop, train
from uoe_jax.train.level import follow_loss, loss_limit
from uoe_jax.train.metrics import read_metrics

shared_programs = shared_programs  # the fixture, for this module too
FACTOR = 6.0
SHORT = 3  # warm-up, where a test can't wait for 20 steps


def followed(losses, factor=FACTOR, usable=None):
    """The level and whether it jumped after each of some losses."""
    level = first_level(TrainConfig(max_loss_jump=factor))
    follow = jax.jit(follow_loss, static_argnums=3)
    usable = np.ones(len(losses), bool) if usable is None else usable
    history = []
    for loss, fine in zip(losses, usable, strict=True):
        limit = float(loss_limit(level, factor))
        level, jumped = follow(level, jnp.float32(loss), jnp.asarray(fine), factor)
        history.append((level, bool(jumped), limit))
    return history


def test_the_level_is_the_mean_and_deviation_of_what_was_accepted(rng):
    losses = rng.normal(3, 0.1, 60).astype(np.float32)
    level, _, _ = followed(losses)[-1]
    # Up to WINDOW losses each weighs the same: a plain mean and variance.
    assert_close(level.mean, losses.astype(np.float64).mean(), 1e-5)
    assert_close(level.variance, losses.astype(np.float64).var(), 1e-4)
    far = followed(np.concatenate([np.full(200, 5.0), np.full(500, 3.0)]), 1e6)[-1][0]
    assert_close(far.mean, 3 + 2 * (1 - 1 / levels.WINDOW) ** 500, 1e-4)
    assert int(far.accepted) == levels.WINDOW


def test_nothing_jumps_in_the_warm_up_nor_while_the_loss_falls_or_rises_slowly(rng):
    steps = np.arange(400)
    noise = rng.normal(0, 0.05, 400)
    for losses in (5.5 * np.exp(-steps / 40) + 1.5 + noise, 2 + steps / 200 + noise):
        assert not any(jumped for _, jumped, _ in followed(losses, 8.0))
    wild = rng.uniform(0, 1e4, levels.WARMUP)
    assert not any(jumped for _, jumped, _ in followed(wild, 1.0))
    # A loss that stands still but for its last bits.
    still = 2 + 1e-6 * rng.normal(size=100)
    assert not any(jumped for _, jumped, _ in followed(still))


def test_jumps_do_not_become_the_level_and_one_that_stays_does(rng):
    noise = rng.normal(0, 0.05, 200)
    calm, high = 2 + noise[:40], 9 + noise[40:]
    history = followed([*calm, *high[:5], 2.01, *high[:30]])
    limit = history[39 + 1][2]
    for level, jumped, seen in history[40:45]:
        assert jumped and seen == limit
        assert float(level.mean) == float(history[39][0].mean)
    assert [int(h[0].jumps) for h in history[40:46]] == [1, 2, 3, 4, 5, 0]
    assert not history[45][1]
    row = [jumped for _, jumped, _ in history[46:]]
    assert row == [True] * levels.PERSISTENT + [False] * (30 - levels.PERSISTENT)
    accepted = high[levels.PERSISTENT : 30]
    assert_close(history[-1][0].mean, accepted.mean(), 1e-5)


def test_what_is_not_usable_leaves_the_level_alone():
    losses = [2.0] * 30 + [math.nan, math.inf, 9.0, math.nan, 9.0]
    usable = [True] * 30 + [False, False, True, False, True]
    history = followed(losses, usable=usable)
    assert [jumped for _, jumped, _ in history[30:]] == [0, 0, 1, 0, 1]
    assert [int(level.jumps) for level, _, _ in history[30:]] == [0, 0, 1, 1, 2]
    assert all(float(level.mean) == 2.0 for level, _, _ in history[30:])


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(levels, "WARMUP", SHORT)
    monkeypatch.setattr(levels, "WINDOW", SHORT + 1)


def test_a_step_that_jumps_changes_no_bit_but_the_counts(short):
    # Once it has learnt one target, another one is far off.
    config = make_tiny("union", attention="dense", max_loss_jump=FACTOR, steps=40)
    good = make_batch(0)
    good["tokens"][:], good["targets"][:] = 65, 66
    bad = good | {"targets": np.full_like(good["targets"], 90)}
    broken = good | {"mask": good["mask"].copy()}
    broken["mask"][0, 0] = np.nan
    batches = [good] * 30 + [bad, bad, good, broken]
    history, metrics, _ = run_steps(config, batches)
    moved = [changed(a, b) for a, b in itertools.pairwise(history)]
    assert [int(m["jumps"]) for m in metrics[:30]] == [0] * 30
    assert [int(m["jumps"]) for m in metrics[30:]] == [1, 2, 0, 0]
    assert [int(m["bad_steps"]) for m in metrics[30:]] == [0, 0, 0, 1]
    for index in (30, 31):
        assert metrics[index]["loss"] > metrics[index]["loss_limit"]
        assert moved[index] == {"step", "loss_level.jumps"}
    assert {n.split(".")[0] for n in moved[32]} >= {"params", "opt_state", "buffers"}
    assert moved[33] == {"step", "bad_steps"}


def test_without_the_option_the_state_and_the_metrics_are_as_they_were():
    history, metrics, _ = run_steps(make_tiny(), [make_batch(0)])
    assert not [name for name in history[-1] if "level" in name]
    assert not {"jumps", "loss_limit"} & metrics[0].keys()


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "6", True])
def test_what_is_no_factor_is_refused(tiny, tmp_path, value):
    with pytest.raises(ConfigError, match="max_loss_jump is"):
        train(tiny(max_loss_jump=value), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def spiky(monkeypatch):
    """Training data in which the targets of some batches are noise."""

    def spike(steps):
        make_dataset = loop.make_dataset

        def wrapped(config, split):
            data = make_dataset(config, split)
            batch = data.batch
            rng = np.random.default_rng(0)

            def changed(step):
                found = batch(step)
                if split == "train" and step in steps:
                    found["targets"] = rng.integers(128, 256, found["targets"].shape)
                    found["targets"] = found["targets"].astype(np.int32)
                return found

            data.batch = changed
            return data

        monkeypatch.setattr(loop, "make_dataset", wrapped)

    return spike


def test_a_jump_is_told_counted_and_left_out_of_the_run(
    tiny, tmp_path, short, spiky, capsys
):
    config = tiny(steps=16, save_every=12, max_loss_jump=3.0)
    spiky({13})
    summary = train(config, tmp_path)
    out = capsys.readouterr().out
    lines = lines_of(tmp_path, "train")
    jumped = lines[13]["loss"]
    assert f"step 14: the loss jumped to {jumped:.4f}, above " in out
    assert "the step is left out" in out and out.count("jumped") == 1
    assert [line["skipped"] for line in lines] == [0] * 13 + [1] * 3
    assert summary["skipped"] == 1 and summary["train_loss"] == lines[-1]["loss"]
    assert not {"jumps", "loss_limit"} & lines[0].keys()
    json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])


def test_a_run_that_goes_on_judges_as_if_it_had_not_stopped(
    tiny, tmp_path, short, spiky
):
    config = tiny(steps=16, save_every=12, max_loss_jump=3.0)
    spiky({11, 12, 14})
    train(config, tmp_path / "whole", quiet=True)
    skipped = [line["skipped"] for line in lines_of(tmp_path / "whole", "train")]
    assert skipped[-1] == 3
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/16")  # goes on from 12, after a jump
    train(config, tmp_path / "run", quiet=True)
    assert_same_bits(tmp_path / "whole", tmp_path / "run")
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "run")


def test_a_checkpoint_without_a_level_begins_one_and_one_with_it_can_do_without(
    tiny, tmp_path, short
):
    train(tiny(steps=4), tmp_path, quiet=True)
    train(tiny(steps=8, max_loss_jump=FACTOR), tmp_path, quiet=True)
    store = Checkpoints(tmp_path / "checkpoints")
    shapes = {"loss_level.accepted": np.zeros(())}
    assert int(store.restore(shapes, step=8)[1]["loss_level.accepted"]) == 4
    train(with_train(tiny(), steps=12), tmp_path, quiet=True)
    assert "loss_level.accepted" not in store.about(12)["arrays"]
    lines = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert [x["step"] for x in lines if x["kind"] == "train"] == [*range(1, 13)]
