"""Runs are read from their files; what is broken is listed with its reason."""

import json
import os

import pytest

from tests.runs.made_runs import make_result, make_run
from uoe_jax.errors import DataError
from uoe_jax.presets import get_preset
from uoe_jax.runs.foreign import read_foreign
from uoe_jax.runs.leaves import settings_of
from uoe_jax.runs.read import (
    BROKEN,
    NEW,
    OK,
    config_record,
    find_files,
    read_run,
    stamp_of,
)


def test_a_run_tells_its_settings_and_its_end(tmp_path):
    run = read_run(make_run(tmp_path / "a", loss=1.25, train__seed=7))
    assert run.status == OK and run.name == "a" and run.seed == 7
    assert run.settings == config_record(get_preset("tiny"), "plan").settings
    assert run["loss"] == 1.25 and run["steps"] == 300 and run["seconds"] == 10.0
    assert run["tokens"] == 300 * 4096 and run["parameters"] == 820_352


def test_an_experiments_result_is_a_run_and_a_summary_is_none(tmp_path):
    file = make_result(tmp_path / "001" / "results" / "dense-1.json", seed=1)
    run = read_run(file)
    assert run.seed == 1 and run["loss"] == 1.2 and run["tokens"] == 1000
    assert run.settings == config_record(get_preset("tiny"), "plan").settings
    (file.parent / "results.json").write_text('{"cuts": [1, 2]}')
    assert read_run(file.parent / "results.json") is None
    assert len(list(find_files([tmp_path]))) == 2


def test_paths_names_and_seeds_do_not_make_another_run(tmp_path):
    one = read_run(make_run(tmp_path / "a", data__path="/data/x/corpus.txt"))
    two = read_run(
        make_run(
            tmp_path / "b",
            data__path="corpus.txt",
            data__cache_dir="/c",
            train__seed=3,
            train__log_every=1,
        )  # fmt: skip
    )
    assert one.settings == two.settings and one.task == two.task
    other = read_run(make_run(tmp_path / "c", data__path="other.txt"))
    assert other.task != one.task


def test_an_older_run_has_todays_defaults_where_it_says_nothing(tmp_path):
    run = make_run(tmp_path / "a")
    raw = json.loads((run / "config.json").read_text())
    del raw["data"]["encoding"], raw["model"]["moba"], raw["optim"]["beta2"]
    raw["optim"]["gone"] = 3
    (run / "config.json").write_text(json.dumps(raw))
    settings = settings_of(read_run(run).settings)
    assert settings.pop(("optim", "gone")) == 3
    assert settings == settings_of(config_record(get_preset("tiny"), "x").settings)


def damage(run, how):
    config, metrics = run / "config.json", run / "metrics.jsonl"
    if how == "cut config":
        config.write_text(config.read_text()[:100])
    elif how == "no config":
        config.unlink()
    elif how == "list":
        config.write_text("[1, 2]")
    elif how == "nan":
        config.write_text('{"model": {"x": NaN}}')
    elif how == "twice":
        config.write_text('{"model": {}, "model": {}}')
    elif how == "deep":
        config.write_text('{"model": {"x": ' + "[" * 1000 + "]" * 1000 + "}}")
    elif how == "long":
        config.write_text(json.dumps({"model": {"x": "y" * (10 << 20)}}))
    elif how == "bytes":
        config.write_bytes(b"\xff\xfe{}")
    elif how == "folder":
        config.unlink()
        config.mkdir()
    elif how == "pipe":
        config.unlink()
        os.mkfifo(config)
    elif how == "metrics":
        metrics.write_text("not json\n")
    elif how == "no metrics":
        metrics.unlink()
    elif how == "half a line":
        metrics.write_text(metrics.read_text() + '{"kind": "eval", "ste')


BREAKS = {
    "cut config": "is not JSON", "no config": "is missing", "list": "not the config",
    "nan": "NaN", "twice": "'model' is there twice", "deep": "more than 64 levels",
    "long": "10,485,760 characters", "bytes": "not UTF-8", "folder": "irectory",
    "pipe": "not a file",
}  # fmt: skip


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_run_says_why_in_one_line(tmp_path, how):
    run = make_run(tmp_path / "a")
    damage(run, how)
    assert list(find_files([tmp_path])) == [run]
    found = read_run(run)
    assert found.status == BROKEN and BREAKS[how] in found.problem
    assert "\n" not in found.problem and len(found.problem) <= 300


@pytest.mark.parametrize(
    ("how", "status"),
    [("metrics", NEW), ("no metrics", NEW), ("half a line", OK)],
)
def test_a_run_without_numbers_is_new_and_half_a_line_is_left_out(
    tmp_path, how, status
):
    run = make_run(tmp_path / "a")
    damage(run, how)
    assert read_run(run).status == status


def test_the_last_validation_is_found_behind_many_lines(tmp_path):
    run = make_run(tmp_path / "a", loss=1.125)
    line = {"kind": "train", "step": 301, "loss": 1.0, "router": [0.5] * 200}
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line | {"step": 301 + i}) + "\n" for i in range(400))
    assert (run / "metrics.jsonl").stat().st_size > 1 << 18
    found = read_run(run)
    assert found["loss"] == 1.125 and found["steps"] == 700


def test_a_stamp_changes_with_the_files(tmp_path):
    run = make_run(tmp_path / "a")
    before = stamp_of(run)
    with open(run / "metrics.jsonl", "a") as file:
        file.write("{}\n")
    assert stamp_of(run) != before
    with pytest.raises(DataError, match="doesn't exist"):
        list(find_files([tmp_path / "nothing"]))


def test_foreign_json_is_one_object_a_file_or_a_line(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").write_text('{"x": 1}')
    (tmp_path / "b.jsonl").write_text('{"x": 1}\n\n[1, 2]\n{"x": NaN}\n{"x": 1, "x"')
    (tmp_path / "c.json").write_text("[" * 1000 + "]" * 1000)
    (tmp_path / "notes.txt").write_text("none")
    found = list(read_foreign(tmp_path))
    places = {r.path.removeprefix(f"{tmp_path}/"): r for r in found}
    assert list(places) == ["b.jsonl:1", "b.jsonl:3", "b.jsonl:4", "b.jsonl:5",
                            "c.json", "in/a.json"]  # fmt: skip
    assert places["b.jsonl:3"].settings == {"value": [1, 2]}
    broken = [name for name, r in places.items() if r.status == BROKEN]
    assert broken == ["b.jsonl:4", "b.jsonl:5", "c.json"]
    assert all("\n" not in places[name].problem for name in broken)
    with pytest.raises(DataError, match=r"has no \.json"):
        list(read_foreign(tmp_path / "in" / ".." / "in" / "none"))
