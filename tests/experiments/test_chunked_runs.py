"""Experiments: training is the trainer's, pauses to the bit and looks at no future."""

import dataclasses
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.run import main
from experiments.shared.arrays import load_split, make_take, train_rows
from experiments.shared.case import (
    Case,
    Study,
    change,
    find_experiment,
    load_config,
    program_key,
    search_rates,
)
from experiments.shared.fit import CHUNKS, Limits, OutOfTime, TooSlow, run_seed
from experiments.shared.programs import Programs
from experiments.shared.queue import Task, begin
from experiments.shared.stack import with_rate
from experiments.shared.work import Worker, work
from tests.compare import assert_close
from uoe_jax.config import (
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    UnionConfig,
)
from uoe_jax.data import make_dataset
from uoe_jax.data.split import SPLITS
from uoe_jax.errors import ConfigError
from uoe_jax.optim import make_optimizer


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    words = np.random.default_rng(0).choice(["tale ", "of ", "the ", "line\n"], 3000)
    (folder / "tale.txt").write_text("".join(words))
    return ExperimentConfig(
        model=ModelConfig(
            max_seq_len=16,
            d_model=16,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            num_kv_heads=2,
            head_dim=8,
            mlp=("union",),
            union=UnionConfig(num_experts=4, top_k=2),
        ),
        data=DataConfig(
            path=str(folder / "tale.txt"),
            cache_dir=str(folder),
            batch_size=4,
            valid_fraction=0.1,
            test_fraction=0.1,
        ),
        optim=OptimConfig(learning_rate=0.01, warmup_steps=4),
        train=TrainConfig(steps=2 * CHUNKS, loss_chunk=64),
    )


@pytest.fixture(scope="module")
def programs(config):
    made = Programs(config, {split: load_split(config, split) for split in SPLITS})
    assert made.compile() > 0
    return made


def run(programs, folder, seed=0, rate=0.01, **limits):
    say = lambda text: None
    paused = folder / f"rate {rate} x-{seed}.npz"
    return run_seed(
        programs, seed, rate, "bits_per_byte", Limits(**limits), say, paused
    )


def test_batches_are_the_trainers(config):
    arrays = load_split(config, "train")
    rows = train_rows(config, config.data.seed, 3)
    data = make_dataset(config, "train")
    for step in range(3):
        mine = make_take(config)(arrays, rows[step])
        for name, theirs in data.batch(step).items():
            assert np.array_equal(mine[name][0], theirs), name


def test_the_rate_is_data_and_nothing_else_changes(config):
    optim = dataclasses.replace(config.optim, learning_rate=0.03, weight_decay=0.2)
    plain = make_optimizer(optim, 40)
    rated = with_rate(make_optimizer(dataclasses.replace(optim, learning_rate=1.0), 40))
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(rng.standard_normal((3, 5)))}
    states = [plain.init(params), rated.init(params) | {"rate": jnp.float32(0.03)}]
    for step in (0, 1, 7, 30):
        grads = {"w": jnp.asarray(rng.standard_normal((3, 5)))}
        both = []
        for number, optimizer in enumerate((plain, rated)):
            updates, states[number] = optimizer.update(
                grads, states[number], params, step=jnp.int32(step)
            )
            both.append(updates["w"])
        assert_close(both[1], both[0], 1e-5)


def test_an_interrupted_run_goes_on_to_the_same_bits(programs, tmp_path):
    whole = run(programs, tmp_path / "whole")
    assert len(whole["curve"]) == CHUNKS and whole["test"]["loss"] < 2.5
    with pytest.raises(OutOfTime, match="after chunk 1"):
        run(programs, tmp_path, deadline=time.perf_counter())
    # Another rate's run that is interrupted too keeps out of its way.
    with pytest.raises(OutOfTime):
        run(programs, tmp_path, rate=0.02, deadline=time.perf_counter())
    files = lambda: sorted(path.name for path in tmp_path.glob("*.npz"))
    assert files() == ["rate 0.01 x-0.npz", "rate 0.02 x-0.npz"]
    later = run(programs, tmp_path)
    assert files() == ["rate 0.02 x-0.npz"]
    losses = lambda result: [line["train"] for line in result["curve"]]
    assert losses(later) == losses(whole)
    assert later["valid"] == whole["valid"] and later["test"] == whole["test"]
    other = run(programs, tmp_path, seed=1)
    assert losses(other) != losses(whole)
    slower = run(programs, tmp_path, rate=1e-4)
    assert slower["test"]["loss"] > whole["test"]["loss"] + 0.1
    with pytest.raises(TooSlow):
        run(programs, tmp_path, seconds=0.0)


def test_steps_that_are_not_finite_are_skipped_or_end_the_run(programs, tmp_path):
    start = programs.start

    def broken(seed):
        state = start(seed)
        scale = lambda a: a * jnp.nan if a.ndim > 1 else a
        return dataclasses.replace(state, params=jax.tree.map(scale, state.params))

    programs.start = broken
    try:
        result = run(programs, tmp_path)
    finally:
        programs.start = start
    assert len(result["curve"]) == 1 and "test" not in result
    assert result["curve"][0]["skipped"] == programs.chunk


def test_scores_are_the_kept_parameters_own(programs, tmp_path):
    result = run(programs, tmp_path)
    checks = [line["valid"] for line in result["curve"] if "valid" in line]
    assert result["valid"] == min(checks, key=lambda scores: scores["loss"])
    assert_close(
        result["valid"]["bits_per_byte"], result["valid"]["loss"] / np.log(2), 1e-6
    )
    moved = result["leak"]
    assert moved["before"] < 1e-6 < 0.01 < moved["after"] and moved["noise"] < 1e-6


def test_a_planted_look_ahead_is_seen(programs):
    state = programs.start(0)
    plain = programs.leak(state.params, state.buffers)
    score = programs._score

    def leaky(params, buffers, batch):
        sums = score(params, buffers, batch)
        last = jnp.sum(batch["tokens"][0, :, -1] % 2) * jnp.sum(batch["mask"])
        return sums | {"nll": sums["nll"] + 0.01 * last}

    programs._score = leaky
    try:
        found = programs.leak(state.params, state.buffers)
    finally:
        programs._score = score
    assert plain["before"] < 1e-6 and found["before"] > 1e-3
    programs._score = lambda *args: score(*args) | {"nll": jnp.nan}
    try:
        broken = programs.leak(state.params, state.buffers)
    finally:
        programs._score = score
    assert np.isnan(broken["before"])
    # Rows in another order see the same last tokens.
    assert found["noise"] < 1e-6


def test_steps_that_fill_no_chunks_are_refused(config):
    odd = dataclasses.replace(config, train=TrainConfig(steps=CHUNKS + 1))
    with pytest.raises(ConfigError, match="use 20"):
        Programs(odd, {})


def test_a_queue_is_worked_through_once(programs, config, tmp_path):
    case = Case(name="union", config=config, seeds=(0, 1))
    study = Study(title="t", metric="bits_per_byte", cases=(case,))
    task = Task("t", sys, study, tmp_path / "t")

    def run_queue(seconds):
        worker = Worker(Limits(time.perf_counter() + seconds))
        key = program_key(config)
        worker.programs[key], worker.compiled[key] = programs, 1.0
        return work([task], worker)

    assert run_queue(0.0) == 0
    assert not (task.out / "results").exists()  # no time for a run
    assert run_queue(300.0) == 0
    files = sorted((task.out / "results").iterdir())
    assert [file.name for file in files] == ["union-0.json", "union-1.json"]
    found = json.loads(files[0].read_text())
    assert found["training_flops_per_step"] > 0 and found["device"] == "cpu"
    before = [file.stat().st_mtime_ns for file in files]
    begin([task])
    assert run_queue(300.0) == 0
    assert before == [file.stat().st_mtime_ns for file in files]


def test_processes_keep_to_models_of_their_own(config, tmp_path):
    wide = change(config, model={"d_ff": 64})
    cases = tuple(
        Case(name=name, config=one, family=name)
        for name, one in (("a", config), ("b", wide))
    )
    search = search_rates(cases, (0.1, 0.2), steps=CHUNKS)
    study = Study(title="t", metric="accuracy", cases=cases, search=search)
    task = Task("t", sys, study, tmp_path)
    first, second = Worker(Limits()), Worker(Limits())
    took = []
    for worker in (first, second, first, second):
        job = worker.next([task])
        took.append(job.case.name)
        worker.programs[program_key(job.case.config)] = None
    assert took == ["rate 0.1 a", "rate 0.1 b", "rate 0.2 a", "rate 0.2 b"]


def test_a_program_is_stopped_at_the_budgets_end_and_tried_again(tmp_path):
    class Endless:
        began = 0

        def finished(self, out, tiny):
            return False

        def program(self, out, tiny):
            self.began += 1
            time.sleep(60)

    module = Endless()
    task = Task("t", module, None, tmp_path)
    for number in (1, 2):
        start = time.perf_counter()
        assert work([task], Worker(Limits(start + 0.2))) == 0
        assert module.began == number and time.perf_counter() < start + 30
        begin([task])


def test_devices_get_a_process_each(tmp_path, capfd):
    args = ["003", "--tiny", "--devices", "0", "--budget-seconds", "0"]
    assert main([*args, "--out", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    assert "[0] cpu, jax" in out and "0 of 10 runs" in out


def test_continued_training_begins_anew_without_its_dense_run(tmp_path, monkeypatch):
    """Its table came along to this machine, its runs didn't."""
    module = load_config(find_experiment("005"))
    (tmp_path / "results.json").write_text(
        json.dumps({"dense": {"valid": 1.0, "test": 1.0}, "cuts": {}})
    )
    trained = []

    def stop(config, folder, quiet):
        trained.append((folder.name, config.train.steps))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        module.program(tmp_path, True)
    assert trained == [("dense", module.dense_config(True).train.steps)]
