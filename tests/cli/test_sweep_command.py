"""`uoe sweep` as a command: trained, interrupted, gone on with, told."""

import json
import signal
import subprocess
import sys
import time

import pytest

from uoe_jax.cli import main
from uoe_jax.runs.load import load_run
from uoe_jax.runs.sweep import RECORD

NAMES = ["learning-rate=1e-3,seed=0", "learning-rate=1e-2,seed=0"]


@pytest.fixture(scope="module")
def command(text_file):
    def make(out, *more, steps=2):
        return ["sweep", "tiny-union", "--grid", "optim.learning-rate=1e-3,1e-2",
                "train.seed=0", "--out", str(out), "--data.path", str(text_file),
                "--data.cache-dir", str(text_file.parent), "--data.batch-size", "8",
                "--model.d-model", "16", "--model.d-ff", "32",
                "--model.num-layers", "1", "--model.head-dim", "4",
                "--model.max-seq-len", "32", "--train.steps", str(steps),
                "--train.eval-batches", "1", "--name", "swept", *more]  # fmt: skip

    return make


@pytest.fixture(scope="module")
def swept(command, tmp_path_factory):
    """A sweep whose second point was in training when SIGTERM came."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    typed = command(out, steps=100_000)
    # The first point ends by itself, the second trains until it is told.
    first = [a.replace("1e-3,1e-2", "1e-3") for a in command(out)]
    assert main(first) == 0
    second = [a.replace("1e-3,1e-2", "1e-2") for a in typed]
    process = subprocess.Popen(
        [sys.executable, "-m", "uoe_jax", *second],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = out / NAMES[1] / "metrics.jsonl"
    until = time.monotonic() + 240
    while time.monotonic() < until and '"step": 1' not in (
        metrics.read_text() if metrics.is_file() else ""
    ):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=120)
    return out, process.returncode, said, errors


def test_a_signal_saves_what_trains_and_ends_the_sweep(swept):
    out, code, said, errors = swept
    assert code == 128 + signal.SIGTERM
    assert f"{NAMES[1]}: stopped, saved; the same command goes on with it" in said
    assert "Traceback" not in said + errors
    assert load_run(out / NAMES[1]).step >= 1
    assert list(json.loads((out / RECORD).read_text())["ended"]) == NAMES[:1]


def test_the_same_command_goes_on_and_prints_the_table(swept, command, capsys):
    out = swept[0]
    step = load_run(out / NAMES[1]).step + 2  # the interrupted point soon ends
    second = [
        a.replace("1e-3,1e-2", "1e-2") for a in command(out, "--json", steps=step)
    ]
    assert main(second) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["run"] for row in found["runs"]] == [str(out / NAMES[1])]
    assert found["runs"][0]["loss"] > 0 and found["runs"][0]["steps"] == step


def test_a_finished_sweep_trains_nothing_and_tells_the_best(swept, command, capsys):
    out = swept[0]
    first = [a.replace("1e-3,1e-2", "1e-3") for a in command(out)]
    assert main(first) == 0
    said = capsys.readouterr().out
    assert "0 of 1 runs to train" in said
    assert f"best: {out / NAMES[0]}" in said
    header = said.splitlines()[1].split()
    assert header == ["learning-rate", "seed", "loss", "bits/byte", "seconds"]
    assert "mean loss" in said


def test_a_point_that_fails_is_told_and_the_others_go_on(command, tmp_path, capsys):
    # Data too short for its rows is found only when the data is prepared.
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    typed = command(tmp_path / "out")
    typed[typed.index("--data.path") + 1] = str(short)
    assert main([a.replace("1e-3,1e-2", "1e-3") for a in typed]) == 1
    said = capsys.readouterr().out
    assert f"[1/1] {NAMES[0]}: failed, " in said and "short.txt" in said
    entry = json.loads((tmp_path / "out" / RECORD).read_text())["ended"][NAMES[0]]
    assert entry["code"] == 2 and "short.txt" in entry["problem"]


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ([], "--grid optim.learning-rate=1e-3,3e-3"),
        (["--grid", "optim.lr=1,2"], "names 'optim.lr'"),
        (["--grid", "optim.eps=a,1"], "--optim.eps is 'a'; it takes a number"),
        (["--grid", "model.d-ff=33,64"], "d-ff=33: "),
        (["--grid", "train.seed=0", "--samples", "0"], "--samples is 0"),
        (["--grid", "train.seed=0", "--out", ""], "--out"),
        (["--grid", "train.seed=0", "--gpus", "-1"], "--gpus"),
        (["--grid", "optim.eps=1..2"], "--samples N"),
        (["--grid", "optim.eps=1e-8,0.00000001"], "are the same run"),
        (["--grid", "train.seed=0,1", "--gpus", "0", "0"], "names 0 twice"),
        (["--grid", "out=a,b"], "uoe train --help-all lists them"),
        (
            ["--grid", "data.allow-changed=yes,no"],
            "has the value 'yes'; a flag is true or",
        ),
        (["--grid", "data.no-allow-changed=true"], "did you mean data.allow"),
        (["--grid", "train.distill-from=gone,away"], "distill-from=gone: no run at"),
    ],
)
def test_a_bad_sweep_is_one_line_before_anything_starts(args, why, capsys, tmp_path,
                                                        monkeypatch):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "tiny-union", *args]) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_dry_run_lists_the_points_and_makes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--grid", "train.seed=0,1,2", "optim.eps=1e-9..1e-7"]
    typed = ["sweep", "tiny", *args, "--samples", "4", "--dry-run", "--draw-seed"]
    assert main([*typed, "3"]) == 0
    first = capsys.readouterr().out
    assert len(first.splitlines()) == 4 and first.startswith("seed=")
    assert main([*typed, "4"]) == 0
    assert capsys.readouterr().out != first
    assert not list(tmp_path.iterdir())


def test_flags_are_swept_too_and_json_lists_the_points(capsys):
    grid = ["--grid", "data.allow-changed=true,False"]
    assert main(["sweep", "tiny", *grid, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"points": ["allow-changed=true", "allow-changed=False"]}


def test_a_budget_ends_a_sweep_that_goes_on_later(command, tmp_path, capsys):
    typed = command(tmp_path / "out", "--budget-seconds", "0.001", "--gpus", "0", "1")
    assert main(typed) == 0
    said = capsys.readouterr().out
    assert "the budget is used up" in said
    assert not (tmp_path / "out" / RECORD).exists()
