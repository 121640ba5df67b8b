"""One run of several lengths: each is the run that is trained for that length alone."""

import dataclasses
import time

import jax
import numpy as np
import pytest

from experiments.shared.arrays import load_split
from experiments.shared.branches import Leg, Run, chunk_steps, plan_legs, run_lengths
from experiments.shared.case import change
from experiments.shared.fit import Limits, OutOfTime
from experiments.shared.programs import Programs, step_rates
from tests.compare import assert_close
from tests.train.tiny_runs import make_tiny
from uoe_jax.data.split import SPLITS
from uoe_jax.errors import ConfigError
from uoe_jax.model import flat_params
from uoe_jax.optim import make_schedule
from uoe_jax.runs.load import load_run
from uoe_jax.train import train

LENGTHS = (20, 40, 60)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    config = make_tiny(
        "union",
        cache_dir=tmp_path_factory.mktemp("text"),
        optim={"schedule": "wsd_sqrt", "warmup_steps": 5},
        steps=LENGTHS[-1],
        loss_chunk=64,
    )
    data = {split: load_split(config, split) for split in SPLITS}
    made = Programs(config, data, chunk_steps(LENGTHS))
    made.compile()
    return made


def run(programs, folder, lengths, seed=3, **limits):
    """Return the result, and every length's parameters."""
    kept = []

    def measure(params, buffers):
        kept.append(jax.device_get((params, buffers)))
        return {"valid": programs.scores(params, buffers, "valid")}

    trained = Run(seed, 0.03, lengths)
    found = run_lengths(
        programs, trained, measure, Limits(**limits), lambda text: None, folder / "p"
    )
    return found, kept


def same_bits(first, second):
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_legs_share_the_constant_part():
    legs = (Leg(0, 0, 16), Leg(20, 16, 20), Leg(0, 16, 32), Leg(40, 32, 40))
    assert plan_legs((20, 40)) == legs
    assert chunk_steps((20, 40)) == 4
    assert chunk_steps((800, 1600, 3200, 6400)) == 160
    with pytest.raises(ConfigError, match="let them rise"):
        plan_legs((40, 20))
    with pytest.raises(ConfigError, match="let them rise"):
        plan_legs((0, 20))


def test_a_branch_has_the_bits_of_the_run_of_its_length(programs, tmp_path):
    found, models = run(programs, tmp_path, LENGTHS)
    assert [line["steps"] for line in found["lengths"]] == list(LENGTHS)
    # Shared steps are trained once: 48 constant ones, and each length's last fifth.
    assert len(found["curve"]) * programs.chunk == 48 + 4 + 8 + 12
    for number, steps in enumerate(LENGTHS):
        alone, (model,) = run(programs, tmp_path, (steps,))
        assert same_bits(model, models[number])
        assert alone["lengths"][0] == found["lengths"][number]
    assert not same_bits(models[0], models[1])
    first, *_, last = (line["valid"]["loss"] for line in found["lengths"])
    assert last < first


def test_a_branch_is_what_the_trainer_makes(programs, tmp_path):
    """By its own loop, from the same config: to rounding, as the programs differ."""
    _, models = run(programs, tmp_path, (20,))
    config = change(programs.config, train={"steps": 20, "seed": 3}, data={"seed": 3})
    train(config, tmp_path / "run", quiet=True)
    theirs = flat_params(load_run(tmp_path / "run").model)
    mine = {
        ".".join(
            str(getattr(key, "key", key)) for key in path if str(key) != ".value"
        ): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(models[0][0])
    }
    assert mine.keys() == theirs.keys()
    for name, array in theirs.items():
        assert_close(mine[name], np.asarray(array), 1e-3)


def test_an_interrupted_run_goes_on_to_the_same_bits(programs, tmp_path):
    whole, models = run(programs, tmp_path / "whole", LENGTHS)
    tries, train_chunk = 0, programs.train
    while True:
        tries += 1
        left = [5]  # chunks before this try is stopped

        def some(*args, left=left):
            left[0] -= 1
            return train_chunk(*args)

        programs.train = some
        clock = time.perf_counter
        try:
            time.perf_counter = lambda left=left: 10.0 if left[0] > 0 else 30.0
            found, kept = run(programs, tmp_path, LENGTHS, deadline=20.0)
            break
        except OutOfTime:
            assert (tmp_path / "p").is_file()
        finally:
            time.perf_counter = clock
            programs.train = train_chunk
    assert tries > 3 and not (tmp_path / "p").exists()
    assert same_bits(kept[-1], models[-1])
    without_seconds = lambda r: (r["lengths"], r["curve"])
    assert without_seconds(found) == without_seconds(whole)


def test_seconds_are_of_chunks_that_nothing_disturbed(programs, tmp_path):
    """A compiling thread makes 13 of 18 chunks four times as slow, or all of them."""
    train_chunk, clock = programs.train, time.perf_counter
    now, trained = [0.0], [0]
    for until, seconds in ((13, 1.0), (18, 4.0)):
        trained[0] = 0
        disturbed = lambda until=until: trained[0] < until

        def slow(*args, disturbed=disturbed):
            now[0] += 4.0 if disturbed() else 1.0
            trained[0] += 1
            return train_chunk(*args)

        programs.train = slow
        try:
            time.perf_counter = lambda: now[0]
            found = run_lengths(
                programs, Run(3, 0.03, LENGTHS, disturbed=disturbed),
                lambda params, buffers: {}, Limits(), print, tmp_path / "p",
            )  # fmt: skip
        finally:
            time.perf_counter, programs.train = clock, train_chunk
        assert found["chunks"] == {"all": 18, "compiled_meanwhile": until}
        assert found["step_seconds"] * programs.chunk == seconds


def test_every_tokens_loss_adds_up_to_the_splits(programs):
    state = programs.start(0)
    each = programs.each_token(state.params, state.buffers, "test")
    whole = programs.scores(state.params, state.buffers, "test")
    assert each["nll"].shape == (len(programs.data["test"]["tokens"]), 16)
    loss = (each["nll"] * each["weight"]).sum() / each["weight"].sum()
    assert_close(loss, whole["loss"], 1e-5)
    right = (each["correct"] * each["weight"]).sum() / each["weight"].sum()
    assert_close(right, whole["accuracy"], 1e-5)


def test_rates_are_the_schedules(programs):
    optim = dataclasses.replace(programs.config.optim, learning_rate=0.03)
    schedule = make_schedule(optim, 60)
    expected = np.array([schedule(step) for step in range(60)])
    assert_close(step_rates(programs.config.optim, 60, 0.03), expected, 1e-6)


def test_what_cannot_branch_is_refused(programs, tmp_path):
    with pytest.raises(ConfigError, match="warmup_steps is 5, but the shortest"):
        run(programs, tmp_path, (5, 40))
    with pytest.raises(ConfigError, match="trains 4 steps, which don't divide"):
        run(programs, tmp_path, (30,))
    config = programs.config
    programs.config = change(config, optim={"schedule": "cosine"})
    try:
        with pytest.raises(ConfigError, match="schedule is 'cosine'"):
            run(programs, tmp_path, LENGTHS)
    finally:
        programs.config = config
