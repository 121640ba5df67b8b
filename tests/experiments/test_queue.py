"""Experiments: which run comes next, who takes it, and what isn't run again."""

import ast
import dataclasses
import sys
from pathlib import Path

import pytest

from experiments.e003_images.data import undo_deltas
from experiments.run import main
from experiments.shared import work
from experiments.shared.case import (
    Case,
    Study,
    change,
    find_experiment,
    program_key,
    search_rates,
)
from experiments.shared.case import load_config as load
from experiments.shared.fit import Limits
from experiments.shared.queue import (
    SEARCH,
    TOO_SLOW,
    Task,
    begin,
    open_jobs,
    outlook,
    restricted,
)
from experiments.shared.results import write_result
from uoe_jax.config import ExperimentConfig
from uoe_jax.errors import ConfigError
from uoe_jax.validation import validate

CONFIG = ExperimentConfig()


def case(name, family=""):
    return Case(name=name, config=CONFIG, seeds=(0, 1), family=family)


def done(job, valid=1.0):
    write_result(
        job.task.out,
        {
            "case": job.case.name,
            "seed": job.seed,
            "rate": job.case.config.optim.learning_rate,
            "key": program_key(job.case.config),
            "valid": {"accuracy": -valid},
            "wall_seconds": 2.0,
        },
    )


@pytest.fixture
def task(tmp_path):
    cases = (case("a", "x"), case("b", "y"))
    search = search_rates(cases, (0.1, 0.2), steps=20)
    study = Study(title="t", metric="accuracy", cases=cases, search=search)
    return Task("t", sys, study, tmp_path)


def test_rates_come_first_then_a_seed_of_each_case(task):
    jobs, waiting = open_jobs([task])
    assert [j.name for j in jobs] == [
        f"rate {r} {f}-100" for f in "xy" for r in (0.1, 0.2)
    ]
    assert waiting and {j.round for j in jobs} == {SEARCH}
    for job, valid in zip(jobs, (3.0, 1.0, 1.0, 3.0), strict=True):
        done(job, valid)
    jobs, waiting = open_jobs([task])
    assert [j.name for j in jobs] == ["a-0", "b-0", "a-1", "b-1"] and not waiting
    assert [j.case.config.optim.learning_rate for j in jobs[:2]] == [0.2, 0.1]
    done(jobs[0])
    assert [j.name for j in open_jobs([task])[0]] == ["b-0", "a-1", "b-1"]


def test_every_run_pauses_in_a_file_of_its_own(task):
    # Names differ behind a dot, which begins no suffix.
    jobs = task.all_jobs()
    paused = {job.paused for job in jobs}
    assert len(paused) == len(jobs) > 4
    assert {path.name for path in paused} == {f"{job.name}.npz" for job in jobs}


def test_other_experiments_run_while_one_waits_for_its_rates(task, tmp_path):
    study = dataclasses.replace(task.study, search=())
    other = Task("u", sys, study, tmp_path / "other")
    jobs, waiting = open_jobs([task, other])
    assert waiting and [j.name for j in jobs[4:]] == ["a-0", "b-0", "a-1", "b-1"]
    only = dataclasses.replace(other, only=("b",))
    assert [j.name for j in open_jobs([only])[0]] == ["b-0", "b-1"]
    narrow = dataclasses.replace(task, only=("b",))
    assert {j.case.family for j in open_jobs([narrow])[0]} == {"y"}


def test_a_run_is_taken_once_and_again_after_a_crash(task):
    job = open_jobs([task])[0][0]
    assert job.claim() and not job.claim()
    job.fail("out of memory")
    assert job.over and job not in open_jobs([task])[0]
    begin([task])
    assert not job.over and job.claim()
    job.fail(f"{TOO_SLOW}: 900 s")
    begin([task])
    assert job.over


def test_the_outlook_takes_other_seeds_as_a_measure(task):
    for job in open_jobs([task])[0]:
        done(job)
    done(open_jobs([task])[0][0])
    assert outlook([task]) == (5, 8, 6.0)


@pytest.mark.parametrize(
    ("part", "kinds"),
    [
        ("mod", {"blocks": ("all", "mod")}),
        ("moba", {"attention": ("moba",)}),
        ("moe", {"mlp": ("moe",)}),
        ("union", {"mlp": ("dense", "union")}),
        ("union", {"attention": ("moh",)}),
        ("union_attention", {"attention": ("union",)}),
    ],
)
def test_what_no_layer_reads_identifies_no_program(part, kinds):
    new = {"mod": {"keep": 0.3}, "moba": {"block_size": 7}}.get(part, {"top_k": 1})
    other = change(CONFIG, model={part: new})
    assert program_key(CONFIG) == program_key(other)
    reads = change(CONFIG, model=kinds)
    assert program_key(reads) != program_key(change(other, model=kinds))


def test_results_of_another_configuration_are_refused(task):
    job = open_jobs([task])[0][0]
    done(job)
    begin([task])
    moved = change(CONFIG, data={"path": "/elsewhere"}, optim={"learning_rate": 7.0})
    same = change(CONFIG, data={"path": "a/elsewhere"})
    assert program_key(moved) == program_key(same)
    wider = tuple(
        dataclasses.replace(c, config=change(c.config, model={"d_ff": 64}))
        for c in task.study.search
    )
    study = dataclasses.replace(task.study, search=wider)
    with pytest.raises(ConfigError, match="another configuration"):
        begin([dataclasses.replace(task, study=study)])


def test_every_model_of_every_experiment_is_valid(monkeypatch, tmp_path):
    monkeypatch.setenv("UOE_DATA_DIR", str(tmp_path))
    for name in ("001", "002", "003", "004", "e008_long_context"):
        study = load(find_experiment(name)).study(True)
        for one in study.cases:
            validate(one.config)
            assert one.family or not study.search
        assert len({c.name for c in study.cases}) == len(study.cases)
        assert set(study.rivals) <= {c.name for c in study.cases}
    with pytest.raises(ConfigError, match="UOE_DATA_DIR"):
        load(find_experiment("001")).study(False)
    with pytest.raises(ConfigError, match="no experiment"):
        find_experiment("999")


def test_bad_requests_are_one_line(capsys, tmp_path):
    out = ["--tiny", "--out", str(tmp_path)]
    assert main(["003", "--only", "dens", *out]) == 2
    assert "did you mean dense?" in capsys.readouterr().err
    for own in ("009", "e010"):
        assert main([own, *out]) == 2
        assert "commands of its own" in capsys.readouterr().err


EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def functions(tree):
    """Return a module's functions by what they do: name, arguments and body."""
    found = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    return {ast.dump(node): node.name for node in found}


def defined(tree):
    """Return the names that a module has of its own, not by an import."""
    words = {node.name for node in tree.body if hasattr(node, "name")}
    return words | {
        node.id for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }  # fmt: skip


def test_what_experiments_share_is_written_once_and_taken_from_where_it_is():
    parse = lambda path: ast.parse(path.read_text("utf-8"))
    trees = {path: parse(path) for path in sorted(EXPERIMENTS.glob("*/*.py"))}
    shared = {}
    for path, tree in trees.items():
        if path.parent.name == "shared":
            shared |= dict.fromkeys(functions(tree), path.name)
    own = {path: tree for path, tree in trees.items() if path.parent.name != "shared"}
    assert len(own) > 20 and len(shared) > 50
    for path, tree in own.items():
        again = [name for said, name in functions(tree).items() if said in shared]
        assert not again, (path, again)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom):
                continue
            package, _, rest = (node.module or "").partition(".")
            file = EXPERIMENTS / f"{rest.replace('.', '/')}.py"
            if package == "experiments" and file in trees:
                names = {alias.name for alias in node.names}
                assert names <= defined(trees[file]), (path, node.module)


def test_seeds_and_fields_can_be_changed():
    study = Study(title="t", metric="accuracy", cases=(case("a"),))
    assert restricted(study, [7]).cases[0].seeds == (7,)
    assert restricted(study, []) == study
    changed = change(CONFIG, model={"union": {"top_k": 2}}, data={"batch_size": 3})
    assert changed.model.union.top_k == 2 and changed.data.batch_size == 3
    assert changed.model.union.num_experts == CONFIG.model.union.num_experts


def test_images_come_out_of_their_deltas():
    import numpy as np

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    red, green, blue = np.moveaxis(images, -1, 0)
    planes = np.stack([green, red - green, blue - green], axis=1)
    down = np.diff(planes, axis=2, prepend=np.uint8(0))
    coded = np.diff(down, axis=3, prepend=np.uint8(0))
    assert coded.dtype == np.uint8
    assert np.array_equal(undo_deltas(coded), images)


class Stub:
    """A model's programs; compiling one named broken fails."""

    def __init__(self, config, data):
        self.name = config.name

    def compile(self):
        if self.name == "broken":
            raise MemoryError("too large")
        return 1.5


class Begun:
    """What is asked to be compiled ahead; what is, took three seconds."""

    def __init__(self):
        self.begun, self.busy = set(), False

    def begin(self, key, config, data):
        self.begun.add(key)

    def wait(self, key):
        return 3.0 if key in self.begun else 0.0


def distinct(name):
    """A case whose programs are its own."""
    config = change(CONFIG, train={"steps": 20 * len(name)})
    return Case(name=name, config=dataclasses.replace(config, name=name), seeds=(0,))


def test_the_next_model_is_compiled_ahead_but_the_last_run_is_left(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(work, "Programs", Stub)
    cases = tuple(distinct(name) for name in ("a", "broken", "ccc"))
    task = Task("t", sys, Study(title="t", metric="accuracy", cases=cases), tmp_path)
    worker = work.Worker(Limits())
    worker.ahead, keys = Begun(), [program_key(case.config) for case in cases]
    said = []

    first = worker.next([task])
    worker.look_ahead([task], 2)  # two are free: one for the other process
    assert worker.upcoming.case.name == "broken" and worker.upcoming.claimed
    assert not worker.ahead.begun  # its data isn't there, and no run waits for data
    worker.splits[work._data_key(first.case)] = {}
    worker.look_ahead([task], 2)
    assert worker.ahead.begun == {keys[1]}
    done(first)
    second = worker.next([task])
    assert second.case.name == "broken" and worker.upcoming is None
    worker.look_ahead([task], 2)
    assert worker.upcoming is None  # the other process may be free sooner
    with pytest.raises(MemoryError, match="too large"):  # when its turn comes
        worker._programs(second.case, said.append)
    second.fail("too large")
    third = worker.next([task])
    assert worker._programs(third.case, said.append).name == "ccc"
    assert said == ["compiled in 1.5 s, 0.0 of them waited for"]
    worker.ahead.begun.add("another")
    worker.look_ahead([task], 1)
    assert worker.ahead.begun == {keys[1], "another"}  # what is made isn't begun
    done(third)
    assert worker.next([task]) is None
