"""Experiments: what is reported of results, and a run that isn't repeated."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.run import main, pick
from experiments.shared.case import HERE, Case, Study, change, find_experiment
from experiments.shared.case import load_config as load
from experiments.shared.results import choose, read_results, table, write_result
from uoe_jax.config import ExperimentConfig
from uoe_jax.errors import ConfigError
from uoe_jax.validation import validate

CONFIG = ExperimentConfig()


def result(case, seed, valid, test, flops=100.0):
    scores = lambda v: {"loss": v, "bits_per_byte": v, "accuracy": v}
    return {
        "case": case,
        "seed": seed,
        "steps": 10,
        "seconds": 2.0,
        "parameters": 1000,
        "forward_flops_per_token": flops,
        "training_flops_per_step": 3 * flops,
        "tokens_per_step": 8,
        "curve": [{"step": 10, "seconds": 2.0, "train": 1.0, "valid": scores(valid)}],
        "valid": scores(valid),
        "test": scores(test),
    }


def study(metric, *names):
    cases = [Case(name=n, config=CONFIG, group=n[0], seeds=(0, 1)) for n in names]
    return Study(title="t", metric=metric, cases=tuple(cases), baseline=names[0])


@pytest.mark.parametrize(
    ("metric", "picked"), [("accuracy", "a2"), ("bits_per_byte", "a1")]
)
def test_validation_chooses_and_test_only_reports(tmp_path, metric, picked):
    plan = study(metric, "a1", "a2", "b1")
    for seed in (0, 1):
        write_result(tmp_path, result("a1", seed, valid=0.3, test=0.9))
        write_result(tmp_path, result("a2", seed, valid=0.4, test=0.1))
        write_result(tmp_path, result("b1", seed, valid=0.2, test=0.2, flops=50.0))
    found = read_results(tmp_path, plan)
    assert choose(plan, found) == [picked, "b1"]
    text = table(plan, found)
    assert f"| **{picked}** |" in text and "| 50% |" in text


def test_spread_is_over_seeds_and_divergence_is_never_chosen(tmp_path):
    plan = study("bits_per_byte", "a1", "a2")
    write_result(tmp_path, result("a1", 0, 1.0, 1.25))
    write_result(tmp_path, result("a1", 1, 1.5, 1.75))
    for seed in (0, 1):
        broken = result("a2", seed, 0.0, 0.0)
        del broken["valid"], broken["test"]
        write_result(tmp_path, broken)
    found = read_results(tmp_path, plan)
    assert choose(plan, found) == ["a1"]
    text = table(plan, found)
    assert "1.5000 ± 0.3536" in text and "| diverged | diverged |" in text


def test_every_model_of_every_experiment_is_valid(monkeypatch, tmp_path):
    monkeypatch.setenv("UOE_DATA_DIR", str(tmp_path))
    names = ("001", "002", "003", "004")
    for name in names:
        cases = load(find_experiment(name)).study(True).cases
        for case in cases:
            validate(case.config)
        assert len({c.name for c in cases}) == len(cases)
    with pytest.raises(ConfigError, match="UOE_DATA_DIR"):
        load(find_experiment("001")).study(False)
    with pytest.raises(ConfigError, match="no experiment"):
        find_experiment("999")


def test_images_come_out_of_their_deltas():
    import numpy as np

    spec = load(HERE / "003_images").data_module()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    red, green, blue = np.moveaxis(images, -1, 0)
    planes = np.stack([green, red - green, blue - green], axis=1)
    down = np.diff(planes, axis=2, prepend=np.uint8(0))
    coded = np.diff(down, axis=3, prepend=np.uint8(0))
    assert coded.dtype == np.uint8
    assert np.array_equal(spec.undo_deltas(coded), images)


def test_a_tiny_experiment_runs_once_and_is_read_back(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"
    args = ["003", "--tiny", "--only", "dense", "--out", str(out)]
    assert main([*args, "--budget-seconds", "0"]) == 0
    assert not (out / "results").exists()  # no time for a run
    assert main(args) == 0
    (file,) = (out / "results").iterdir()
    found = json.loads(file.read_text())
    assert found["config"]["name"] == "dense" and found["steps"] == 100
    assert len(found["curve"]) == 20 and math.isfinite(found["curve"][-1]["train"])
    assert found["test"]["accuracy"] > 0.3  # of ten digits
    before = file.stat().st_mtime_ns
    capsys.readouterr()
    assert main(args) == 0
    assert file.stat().st_mtime_ns == before
    assert "| dense |" in capsys.readouterr().out
    assert {"table.md", "plot.png"} <= {p.name for p in out.iterdir()}


def test_seeds_and_cases_can_be_picked():
    plan = pick(study("accuracy", "a1", "b1"), ["b1"], [7])
    assert [(c.name, c.seeds) for c in plan.cases] == [("b1", (7,))]
    changed = change(CONFIG, model={"union": {"top_k": 2}}, data={"batch_size": 3})
    assert changed.model.union.top_k == 2 and changed.data.batch_size == 3
    assert changed.model.union.num_experts == CONFIG.model.union.num_experts
