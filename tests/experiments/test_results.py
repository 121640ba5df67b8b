"""Experiments: what is reported of results."""

import json
import math
import sys

import pytest

from experiments.shared.case import Case, Study, find_experiment, load_config
from experiments.shared.plot import plot
from experiments.shared.queue import Task, best_rates
from experiments.shared.results import (
    best,
    causality,
    read_results,
    table,
    write_result,
    write_summary,
)
from experiments.shared.stats import difference
from tests.compare import assert_close
from uoe_jax.config import ExperimentConfig, OptimConfig

CONFIG = ExperimentConfig()


def result(case, seed, valid, test, flops=100.0, **more):
    scores = lambda v: {"loss": v, "bits_per_byte": v, "accuracy": v}
    return {
        "case": case,
        "seed": seed,
        "rate": 0.001,
        "steps": 10,
        "seconds": 2.5,
        "step_seconds": 0.2,
        "wall_seconds": 3.0,
        "parameters": 1000,
        "forward_flops_per_token": flops,
        "training_flops_per_step": 3 * flops,
        "tokens_per_step": 8,
        "curve": [{"step": 10, "seconds": 2.0, "train": 1.0, "valid": scores(valid)}],
        "valid": scores(valid),
        "test": scores(test),
        "leak": None,
    } | more


def study(metric, *names, **more):
    cases = tuple(Case(name=n, config=CONFIG, seeds=(0, 1)) for n in names)
    return Study(title="t", metric=metric, cases=cases, baseline=names[0], **more)


@pytest.mark.parametrize(
    ("metric", "picked"), [("accuracy", "a2"), ("bits_per_byte", "a1")]
)
def test_validation_chooses_and_test_only_reports(tmp_path, metric, picked):
    plan = study(metric, "b1", "a1", "a2", rivals=("a1", "a2"))
    for seed in (0, 1):
        write_result(tmp_path, result("a1", seed, valid=0.3, test=0.9))
        write_result(tmp_path, result("a2", seed, valid=0.4, test=0.1))
        write_result(tmp_path, result("b1", seed, valid=0.2, test=0.2, flops=50.0))
    found = read_results(tmp_path, plan.cases)
    assert best(plan, found, plan.rivals) == picked
    text = table(plan, found)
    assert f"test, less {picked} |" in text and "| 200% |" in text


def test_the_rate_of_a_family_is_chosen_by_validation(tmp_path):
    rated = lambda rate: ExperimentConfig(optim=OptimConfig(learning_rate=rate))
    search = tuple(
        Case(name=f"{family} {rate}", config=rated(rate), seeds=(100,), family=family)
        for family in ("a", "b")
        for rate in (0.1, 0.2, 0.4)
    )
    plan = study("bits_per_byte", "dense", search=search)
    losses = {"a": (2.0, 1.0, 3.0), "b": (1.0, 2.0, 3.0)}
    for case in search:
        rate = case.config.optim.learning_rate
        valid = losses[case.family][(0.1, 0.2, 0.4).index(rate)]
        write_result(tmp_path, result(case.name, 100, valid, -valid, rate=rate))
    assert best_rates(tmp_path, plan) == {"a": 0.2, "b": 0.1}
    diverged = result("a 0.2", 100, 0.0, 0.0)
    del diverged["valid"], diverged["test"]
    write_result(tmp_path, diverged)
    assert best_rates(tmp_path, plan)["a"] == 0.1


def test_spread_is_over_seeds_and_divergence_is_never_chosen(tmp_path):
    plan = study("bits_per_byte", "a1", "a2")
    write_result(tmp_path, result("a1", 0, 1.0, 1.25))
    write_result(tmp_path, result("a1", 1, 1.5, 1.75))
    for seed in (0, 1):
        broken = result("a2", seed, 0.0, 0.0)
        del broken["valid"], broken["test"]
        write_result(tmp_path, broken)
    found = read_results(tmp_path, plan.cases)
    assert best(plan, found, ("a1", "a2")) == "a1"
    text = write_summary(tmp_path, plan)
    assert "1.5000 ± 0.3536" in text and "| diverged | diverged |" in text
    assert "± " in (tmp_path / "table.md").read_text()
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_differences_are_paired_by_seed():
    runs = lambda *tests: [result("x", s, 0.0, t) for s, t in enumerate(tests)]
    mean, error = difference(runs(1.0, 2.0, 3.0), runs(0.9, 1.9, 2.9), "accuracy")
    assert_close([mean, error], [0.1, 0.0], 1e-12)
    mean, error = difference(runs(1.0, 2.0), runs(0.5, 2.5, 9.0), "accuracy")
    assert mean == 0.0
    assert_close(error, math.sqrt(0.5) / math.sqrt(2), 1e-12)
    assert difference(runs(1.0), runs(2.0), "accuracy") == (-1.0, None)
    assert difference(runs(), runs(2.0), "accuracy") is None


def test_cases_that_change_one_are_compared_with_it(tmp_path):
    plan = study("bits_per_byte", "dense", "union", "changed", origin="union")
    for seed in (0, 1):
        write_result(tmp_path, result("dense", seed, 1.5, 1.5))
        write_result(tmp_path, result("union", seed, 1.0, 1.0 + seed))
        write_result(tmp_path, result("changed", seed, 1.0, 1.25 + 1.5 * seed))
    found = read_results(tmp_path, plan.cases)
    lines = table(plan, found).splitlines()
    assert "| test, less dense | test, less union |" in lines[0]
    assert "| +0.5000 ± 0.2500 |" in lines[4]  # 0.25 and 0.75 above, by seed
    rows = plot(plan, found)
    assert rows != plot(study("bits_per_byte", "dense", "union", "changed"), found)
    for seed in (0, 1):  # an origin that diverged leaves nothing to compare with
        broken = result("union", seed, 0.0, 0.0)
        del broken["valid"], broken["test"]
        write_result(tmp_path, broken)
    assert "| diverged | diverged |" in write_summary(tmp_path, plan)
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize("further", [{}, {"dense_further": {"test": 1.4}}])
def test_cuts_are_shown_beside_the_dense_model(tmp_path, further):
    """With the dense model's own further steps and, where they are missing, without."""
    module = load_config(find_experiment("005"))
    split = {"max_logit_difference": 1e-5, "max_logit": 20.0}
    ends = {"before": {"test": 1.75}, "after": {"test": 1.5}}
    cuts = {"whole": ends | {"decompose": split}, "begun": {"decompose": split}}
    results = {"further": 200, "dense": {"test": 1.45}, "cuts": cuts} | further
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = module.summary(tmp_path)
    assert "| whole | 1e-05 (largest logit 20) | 1.4500 | 1.7500 | 1.5000 |" in text
    assert ("1.4000" in text) == bool(further)
    assert (tmp_path / "plot.png").stat().st_size > 5_000


def test_a_leak_is_named():
    quiet = {"a": [result("a", 0, 1, 1, leak={"before": 1e-7, "after": 2.0})]}
    assert "nothing leaks" in causality(quiet)
    loud = {"a": [result("a", 0, 1, 1, leak={"before": 3e-3, "after": 2.0})]}
    assert "LEAKS: a, seed 0" in causality(loud)
    broken = {"a": [result("a", 0, 1, 1, leak={"before": math.nan, "after": 2.0})]}
    assert "LEAKS: a, seed 0" in causality(broken)
    assert causality({"a": [result("a", 0, 1, 1)]}) == ""


def test_what_rounding_alone_moves_is_no_leak():
    moved = {"before": 3e-4, "after": 2.0, "noise": 2e-4}
    text = causality({"a": [result("a", 0, 1, 1, leak=moved)]})
    assert "nothing leaks" in text and "rounding alone: 2.0e-04" in text
    moved = moved | {"before": 9e-4}
    assert "LEAKS" in causality({"a": [result("a", 0, 1, 1, leak=moved)]})
    # Rows that see each other move when their order changes, too.
    moved = moved | {"before": 5e-3, "noise": 5e-3}
    assert "LEAKS" in causality({"a": [result("a", 0, 1, 1, leak=moved)]})


def test_unknown_families_keep_their_rate(tmp_path):
    plan = study("bits_per_byte", "dense")
    settled = Task("t", sys, plan, tmp_path).settled()
    assert settled == plan
