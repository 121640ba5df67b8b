"""Every option of `uoe complete` once, from files of users to what is written."""

import csv
import json
import re
from dataclasses import fields
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.compare import assert_close
from uoe_jax.cli import main
from uoe_jax.complete.options import CompleteArgs
from uoe_jax.linalg.completion import load_factors

CASES = Path(__file__).parent / "cases"
QUICK = ["--rank", "1", "--iters", "3", "--ridge", "1", "--no-refit"]
# Each option with a value that changes what is done or written.
OPTIONS = {
    "rank": ["--rank", "auto"],
    "holdout": ["--holdout", "0.2"],
    "ridge": ["--ridge", "2"],
    "bias_ridge": ["--bias-ridge", "3"],
    "ridge_power": ["--ridge-power", "1"],
    "biases": ["--no-biases"],
    "solver": ["--solver", "cg"],
    "tol": ["--tol", "0.5"],
    "iters": ["--iters", "1"],
    "patience": ["--patience", "1"],
    "refit": ["--refit"],
    "columns": ["--columns", "2,1,3"],
    "delimiter": ["--delimiter", ","],
    "decimal": ["--decimal", "."],
    "predict": ["--predict", str(CASES / "tiny20.csv")],
    "float64": ["--float64"],
    "seed": ["--seed", "7"],
    "quiet": ["--quiet"],
}


def refuse(name):
    raise AssertionError(f"{name} isn't JSON")


def read_history(out):
    text = (out / "history.json").read_text()
    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def run(tmp_path, capsys):
    """Return a function that runs the command; it gives (status, out, err, folder)."""

    def run(*args, out="out"):
        args = [str(arg) for arg in args]
        status = main(["complete", *args, "--out", str(tmp_path / out)])
        said = capsys.readouterr()
        return status, said.out, said.err, tmp_path / out

    return run


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_runs(name, run):
    wide = jax.config.read("jax_enable_x64")
    status, said, err, out = run(CASES / "tiny20.csv", *QUICK, *OPTIONS[name])
    factors = load_factors(out / "factors.safetensors")
    jax.config.update("jax_enable_x64", wide)
    assert (status, err) == (0, "")
    history = read_history(out)
    assert (said == "") == (name == "quiet")
    assert history["shape"] == ([4, 5] if name == "columns" else [5, 4])
    assert history["refitted"] == (name == "refit")
    assert factors.has_biases == (name != "biases")
    assert (factors.u.dtype == np.float64) == (name == "float64")
    assert (out / "predictions.csv").exists() == (name == "predict")
    assert len(history["sweeps"]["train_rmse"]) <= (1 if name == "iters" else 3)


def test_no_option_is_left_out():
    names = {field.name for field in fields(CompleteArgs)}
    assert names == {*OPTIONS, "file", "out"}


@pytest.mark.parametrize(
    "name", [p.name for p in CASES.iterdir() if p.name != "missing_rating.csv"]
)
def test_files_that_users_had_are_completed(name, run):
    status, _, err, out = run(CASES / name, *QUICK, "--holdout", "0.1")
    assert status == 0
    assert ("nothing to learn" in err) == (name == "implicit_ones.csv")
    assert err.count("\n") <= 1
    history = read_history(out)
    assert history["heldout"]["rmse"] < 3  # of ratings up to 5: no ids among them


def test_a_missing_rating_names_its_line(run):
    status, _, err, out = run(CASES / "missing_rating.csv", *QUICK)
    assert status == 2 and not out.exists()
    assert "line 9" in err and "what is unknown is left out" in err
    assert err.count("\n") == 1


def test_one_held_out_entry_has_no_interval_and_json_stays_strict(run):
    _, _, _, out = run(CASES / "tiny20.csv", *QUICK)
    assert read_history(out)["heldout"]["interval95"] == [0.0, None]


def test_predictions_are_by_the_users_own_ids(run, tmp_path):
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("B00012\tu29\nB00027\tu26\nB00027\tnew\nnew,too\tnew\n")
    pairs.write_text("item\tuser\n" + pairs.read_text())
    status, said, _, out = run(CASES / "strings.csv", *QUICK, "--predict", pairs)
    assert status == 0 and "4 pairs, 2 of them" in said
    with (out / "predictions.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == ["user", "item", "prediction"]
    assert [line[:2] for line in lines[1:]] == [
        ["u29", "B00012"],
        ["u26", "B00027"],
        ["new", "B00027"],
        ["new", "new,too"],
    ]
    factors = load_factors(out / "factors.safetensors")
    dense = np.asarray(factors.dense())
    row, col = factors.info["row_ids"] == "u26", factors.info["col_ids"] == "B00027"
    made = [float(line[2]) for line in lines[1:]]
    assert_close(made[1], dense[row, col][0], 1e-5)
    bias = np.asarray(factors.col_bias)[col][0]
    assert_close(made[2], float(factors.offset) + bias, 1e-5)
    assert_close(made[3], float(factors.offset), 1e-5)

    first = (out / "predictions.csv").read_bytes()
    (out / "predictions.csv").unlink()
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for place in (out, out / "factors.safetensors"):  # without a fit
        status = main(["complete", str(place), "--predict", str(pairs), "--quiet"])
        assert status == 0 and (out / "predictions.csv").read_bytes() == first
    assert before.items() <= {p.name: p.read_bytes() for p in out.iterdir()}.items()


def test_large_ids_are_kept_from_a_file_to_its_predictions(run):
    pairs = CASES / "u64.csv"
    _, _, _, out = run(pairs, *QUICK, "--predict", pairs)
    given = [line.split(",")[:2] for line in pairs.read_text().split()[1:]]
    made = [
        line.split(",")[:2] for line in (out / "predictions.csv").read_text().split()
    ]
    assert made[1:] == given


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--columns", "a,b,c"], "no column 'a'"),
        (["--columns", "0,1,2"], "counted from 1"),
        (["--delimiter", "x"], "delimiter is 'x'"),
        (["--decimal", "x"], "decimal is 'x'"),
        (["--predict", "none.csv"], "none.csv doesn't exist"),
        (["--holdout", "nan"], "holdout is nan"),
        (["--seed", str(2**32)], "below 2^32"),
        (["--patience", "0"], "patience is 0"),
        (["--bias-ridge", "-1"], "bias_ridge is -1"),
        (["--bias-ridge", "1", "--no-biases"], "-ridge is 1 without biases"),
        (["--holdout", "0"], "refit is False with holdout 0"),
        (["--holdout", "0", "--refit", "--patience", "2"], "patience is 2 with"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(args, words, run):
    status, _, err, out = run(CASES / "tiny20.csv", *QUICK, "--quiet", *args)
    assert status == 2 and words in err and err.count("\n") == 1
    assert not out.exists()


def test_a_delimiter_of_what_is_no_text_is_refused(run, tmp_path):
    path = tmp_path / "entries.npz"
    np.savez(path, user=np.arange(6), item=np.arange(6) % 3, rating=np.ones(6))
    status, _, err, out = run(path, *QUICK, "--quiet", "--delimiter", ",")
    assert status == 2 and "is no text, so delimiter ','" in err and not out.exists()
    assert run(path, *QUICK, "--quiet", "--holdout", "0.5")[0] == 0


def test_a_folder_is_only_predicted_from(run, tmp_path):
    _, _, _, out = run(CASES / "tiny20.csv", *QUICK)
    assert run(out)[0] == 2
    status, _, err, _ = run(out, "--predict", CASES / "tiny20.csv", "--rank", "2")
    assert status == 2 and "leave out --rank" in err
    status, _, err, _ = run(tmp_path, "--predict", CASES / "tiny20.csv", out="new")
    assert status == 2 and "no factors.safetensors" in err
    assert not (tmp_path / "new").exists()


def test_names_in_files_are_no_markup(run, tmp_path):
    path = tmp_path / "[bold]x.csv"
    path.write_bytes((CASES / "tiny20.csv").read_bytes())
    status, said, _, _ = run(path, *QUICK)
    assert status == 0 and re.search(r"\[bold\]x\.csv: 20 entries", said)
