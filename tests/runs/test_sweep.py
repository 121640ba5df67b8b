"""Which points a sweep has, and what its folder remembers of them."""

import json
import math
import os
import random
import shutil

import pytest

from uoe_jax.config import ExperimentConfig, TrainConfig, config_hash
from uoe_jax.errors import ConfigError
from uoe_jax.runs.grid import Range, make_points, parse_axis, point_name
from uoe_jax.runs.lock import RunLock
from uoe_jax.runs.sweep import RECORD, Sweep

LR = "optim.learning-rate"


def axes(*texts):
    return [parse_axis(text) for text in texts]


def test_a_grid_has_all_combinations_in_order():
    points = make_points(axes(f"{LR}=1e-3,3e-3", "train.seed=0,1,2"), None, 0)
    assert len(points) == len(set(points)) == 6
    assert points[0] == ((LR, "1e-3"), ("train.seed", "0"))
    assert points[1] == ((LR, "1e-3"), ("train.seed", "1"))
    assert [point_name(p) for p in points][-1] == "learning-rate=3e-3,seed=2"


def test_options_are_named_as_in_python_too():
    assert parse_axis("--optim.learning_rate=1") == (LR, ("1",))
    assert parse_axis(" model.attention = dense union , dense ") == (
        "model.attention",
        ("dense union", "dense"),
    )


def test_names_are_folders_and_tell_equal_leaves_apart():
    point = (("model.union.top-k", "2"), ("model.moe.top-k", "1"))
    assert point_name(point) == "model.union.top-k=2,model.moe.top-k=1"
    hostile = point_name((("data.path", "../a b/\x1b[31m\n"),))
    assert "/" not in hostile and "\n" not in hostile and "\x1b" not in hostile


def test_drawn_points_are_in_their_ranges_and_repeat_with_their_seed():
    given = axes(f"{LR}=1e-4..1e-1", "model.d-model=16..1024", "train.seed=0,1")
    points = make_points(given, 200, 7)
    assert points == make_points(given, 200, 7) != make_points(given, 200, 8)
    assert len(points) == len(set(points)) == 200
    rates = [float(dict(p)[LR]) for p in points]
    widths = [dict(p)["model.d-model"] for p in points]
    assert 1e-4 <= min(rates) < 1e-3 and 1e-2 < max(rates) <= 1e-1
    # Each factor of ten as often as another, to within chance.
    low = sum(rate < 10**-2.5 for rate in rates)
    assert abs(low - 100) < 5 * math.sqrt(50)
    assert all(w.isdigit() and 16 <= int(w) <= 1024 for w in widths)


def test_a_small_grid_is_drawn_whole_and_never_twice():
    points = make_points(axes("train.seed=0,1,2"), 50, 0)
    assert sorted(points) == [(("train.seed", str(i)),) for i in range(3)]


def test_a_range_of_whole_numbers_reaches_both_ends():
    rng = random.Random(0)
    drawn = {Range(low=1.0, high=3.0, whole=True).draw(rng) for _ in range(200)}
    assert drawn == {"1", "2", "3"}


@pytest.mark.parametrize(
    ("low", "high", "whole"),
    [(0.12345, 0.123451, False), (99999.6, 99999.7, False), (1e17, 1e17 + 64, True)],
)
def test_what_is_drawn_of_a_narrow_range_lies_in_it(low, high, whole):
    drawn = Range(low=low, high=high, whole=whole)
    rng = random.Random(0)
    assert all(low <= float(drawn.draw(rng)) <= high for _ in range(200))


def test_a_sweep_has_no_more_runs_than_anybody_waits_for():
    many = axes(*(f"model.x{i}=" + ",".join(map(str, range(10))) for i in range(4)))
    with pytest.raises(ConfigError, match="10,000 runs; use at most 1,000"):
        make_points(many, None, 0)
    with pytest.raises(ConfigError, match="at most 1,000"):
        make_points(axes(f"{LR}=1e-4..1e-1"), 10**12, 0)
    assert len(make_points(many, 5, 0)) == 5


def test_a_long_name_fits_a_file_system_and_stays_its_own():
    names = [point_name((("data.path", "é" * 300 + end),)) for end in "ab"]
    assert len(set(names)) == 2
    assert all(len(name.encode()) <= 200 for name in names)


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        (["optim.eps"], "NAME=A,B,C"),
        (["=1,2"], "NAME=A,B,C"),
        (["optim.eps="], "NAME=A,B,C"),
        (["optim.eps=1,,2"], "NAME=A,B,C"),
        (["optim.eps=1,1"], "a value twice"),
        (["optim.eps=2..1"], "to a larger one"),
        (["optim.eps=0..1"], "from a positive number"),
        (["optim.eps=a..b"], "from a positive number"),
        (["optim.eps=nan..1"], "from a positive number"),
        (["optim.eps=1..inf"], "from a positive number"),
        (["optim.eps=1,2", "optim.eps=3"], "names optim.eps twice"),
        (["optim.eps=1..2"], "--samples N"),
        (["optim.eps=1 --train.steps 5"], "the option --train.steps among"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(texts, why):
    with pytest.raises(ConfigError, match=why) as error:
        make_points(axes(*texts), None, 0)
    assert "\n" not in str(error.value)


def make_sweep(folder, **seeds):
    configs = {
        name: ExperimentConfig(train=TrainConfig(seed=seed))
        for name, seed in seeds.items()
    }
    return Sweep(folder=folder, configs=configs, note=lambda text: None)


def remember(folder, **ended):
    for name in ended:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text("{}")
    (folder / RECORD).write_text(json.dumps({"ended": ended}))


def entry(code=0, seconds=1, config=""):
    return {"code": code, "seconds": seconds, "config": config}


def test_finished_points_stay_and_failed_ones_are_tried_again(tmp_path):
    sweep = make_sweep(tmp_path, a=0, b=1, c=2)
    sweep.open()
    assert sweep.left() == ["a", "b", "c"]
    config = {name: config_hash(sweep.configs[name]) for name in "ab"}
    remember(
        tmp_path,
        a={"code": 0, "seconds": 1, "config": config["a"]},
        b={"code": 2, "seconds": 1, "config": config["b"], "problem": "no"},
    )
    sweep.open()
    assert sweep.left() == ["b", "c"]


def test_a_name_with_other_settings_is_refused(tmp_path):
    sweep = make_sweep(tmp_path, a=0)
    remember(tmp_path, a={"code": 0, "seconds": 1, "config": "another"})
    with pytest.raises(ConfigError, match="other settings; choose another --out"):
        sweep.open()


def test_a_failed_point_may_be_tried_with_other_settings(tmp_path):
    sweep = make_sweep(tmp_path, a=0)
    remember(tmp_path, a=entry(code=2, config="another"))
    sweep.open()
    assert sweep.left() == ["a"]


def test_a_finished_point_whose_folder_is_gone_is_trained_again(tmp_path):
    sweep = make_sweep(tmp_path, a=0)
    remember(tmp_path, a=entry(config=config_hash(sweep.configs["a"])))
    sweep.open()
    assert sweep.left() == []
    shutil.rmtree(tmp_path / "a")
    assert sweep.left() == ["a"]


def test_failures_of_other_points_in_the_folder_do_not_count(tmp_path):
    sweep = make_sweep(tmp_path, a=0)
    done = entry(config=config_hash(sweep.configs["a"]))
    remember(tmp_path, a=done, other=entry(code=2))
    sweep.open()
    assert sweep.run() == 0


def test_a_problem_of_a_worker_ends_the_sweep_in_one_line(tmp_path):
    sweep = make_sweep(tmp_path, a=0)
    sweep.open()
    (tmp_path / "a").write_text("a file in the place of a run's folder")
    with pytest.raises(ConfigError, match="a can't be written.*another --out"):
        sweep.run()


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    lock = RunLock(tmp_path, print)
    lock.acquire()
    try:
        with pytest.raises(ConfigError, match=rf"{os.getpid()}.*is sweeping.* --out"):
            make_sweep(tmp_path, a=0).run()
    finally:
        lock.release()


def test_a_point_that_still_trains_is_waited_for_not_failed(tmp_path):
    said = []
    sweep = make_sweep(tmp_path, a=0)
    sweep.note, sweep.budget_seconds = said.append, 0.3
    sweep.open()
    (tmp_path / "a").mkdir()
    lock = RunLock(tmp_path / "a", print)
    lock.acquire()
    try:
        assert sweep.run() == 0
    finally:
        lock.release()
    assert f"process {os.getpid()}" in said[0] and "waiting" in said[0]
    assert "budget" in said[1]
    assert not (tmp_path / RECORD).exists()  # neither failed nor ended


@pytest.mark.parametrize(
    "changed",
    [{"code": "0"}, {"code": True}, {"seconds": "1"}, {"seconds": -1}, {"config": 1}],
)
def test_an_entry_of_other_types_is_refused(tmp_path, changed):
    remember(tmp_path, a=entry() | changed)
    with pytest.raises(ConfigError, match=f"{RECORD} isn't a sweep's"):
        make_sweep(tmp_path, a=0).open()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"ended": 1}', '{"ended": {"a": 1}}'])
def test_a_damaged_record_is_refused(tmp_path, text):
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(ConfigError, match=f"{RECORD}.*(damaged|restore)"):
        make_sweep(tmp_path, a=0).open()


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another --out"):
        make_sweep(tmp_path / "file", a=0).open()
