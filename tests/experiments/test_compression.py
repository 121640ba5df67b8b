"""010: the same program on a tiny model; what is there isn't made again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.e010_compression import run as e010
from experiments.e010_compression.run import OPENED, ROWS, SHARES, SMALL
from experiments.e010_compression.spectra import directions, largest_share
from experiments.e010_compression.subject import write_texts
from experiments.e010_compression.table import tables, write_summary
from tests.interop.tiny_folders import TEXT, write_folder
from uoe_jax.errors import ConfigError, NonFiniteError, OutOfMemory
from uoe_jax.train import StopRun

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and articles."""
    folder = tmp_path_factory.mktemp("e010")
    write_folder(folder / "model")
    texts = [f"Article {n}. {TEXT[40 * n : 40 * n + 2500]}" for n in range(60)]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "articles.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def start(place, *words):
    words = ["-m", "experiments.e010_compression.run", "--tiny", *words]
    return subprocess.run(
        [sys.executable, *words, "--articles", place / "articles.jsonl"],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip


def run(place, *parts):
    given = ["--model", place / "model", "--out", place / "out", "--parts", *parts]
    done = start(place, *given)
    assert done.returncode == 0, done.stderr
    return json.loads((place / "out" / "results.json").read_text())


def test_one_file_opens_as_what_is_cut_apart_and_a_second_call_goes_on(place):
    first = run(place, "anytime")["rows"]
    assert [row["cut"] for row in first[1:]] == list(OPENED)
    for row in first[1:]:
        for text, perplexity in row["apart"].items():
            assert row[text] == pytest.approx(perplexity, abs=1e-3 * perplexity)
    found = run(place, "heal", "rows", "ranks")["rows"]
    assert found[: len(first)] == first
    # A healed cut has its row among the rows too.
    more = [row for row in found[len(first) :] if "steps" not in row]
    assert len(more) == len(ROWS) + 2 * len(SHARES) + 2 * len(SMALL)
    assert all(row["blocks"] < 1 and row["python"] > 1 for row in more)
    ranks = [
        row["blocks"] for row in more if row.get("rank") and row["method"] == "svd"
    ]
    assert ranks == sorted(ranks, reverse=True)


def test_a_cut_is_healed_by_the_same_steps_as_others(place):
    rows = [row for row in run(place, "heal")["rows"] if row.get("steps")]
    assert [row["method"] for row in rows] == ["lord", "modegpt"]
    for row in rows:
        assert row["before"].keys() == row["after"].keys() == {"wikipedia", "python"}
        assert row["before"] != row["after"] and len(row["losses"]) == row["steps"]
    assert "| lord |  | 20% |" in (place / "out" / "table.md").read_text()
    assert (place / "out" / "healing.png").stat().st_size > 5_000


@pytest.mark.parametrize("error", [
    StopRun("stopped by SIGTERM", 143), OutOfMemory("no room"), NonFiniteError("nan"),
])  # fmt: skip
def test_what_stops_a_row_is_no_refusal_and_ends_the_call(
    error, tmp_path, monkeypatch, capsys
):
    put = []

    class Stopped:
        def __init__(self, options):
            self.out, self.tiny, self.parts = tmp_path, True, options.parts
            self.results = {}
            self.subject = SimpleNamespace(folder=tmp_path)
            self.lacks = lambda kind, **about: True
            self.put = lambda **row: put.append(row)

        def observe(self):
            return SimpleNamespace(model=None)

        def cut(self, observed, wanted):
            raise error

    monkeypatch.setattr(e010, "Experiment", Stopped)
    monkeypatch.setattr(e010, "prepare_process", lambda compiled: None)
    monkeypatch.setattr(e010, "switch_off_command_buffers", lambda: None)
    monkeypatch.setattr(e010, "write_summary", lambda out, results: None)
    given = ["--model", "m", "--articles", "a", "--out", str(tmp_path), "--tiny"]
    for part in ("heal", "rows"):
        assert e010.main([*given, "--parts", part]) == error.exit_code
        said = capsys.readouterr().err
        assert str(error) in said and not put
        assert ("the same line goes on" in said) == isinstance(error, StopRun)
    error = ConfigError("bad")
    assert e010.main([*given, "--parts", "heal"]) == 0
    assert [row["refused"] for row in put] == ["bad", "bad"]


def test_a_model_of_ours_is_trained_first_and_goes_on_where_time_ended(place):
    folder = place / "python"
    folder.mkdir()
    for split in ("train", "valid"):
        texts = [f"def {split}{n}(x):\n    return x + {n}\n" * 40 for n in range(30)]
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    out = place / "ours"
    words = ["--ours", "--python", folder, "--out", out, "--parts", "ranks"]
    first = start(place, *words, "--minutes", "0.01")
    assert first.returncode == 0 and "steps are done; the same line" in first.stdout
    assert not (out / "results.json").is_file()
    done = start(place, *words)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "results.json").read_text())
    assert found["model"] == "ours" and found["rows"][0]["method"] == "dense"
    assert len(found["rows"]) == 1 + 2 * len(SHARES) + 2 * len(SMALL)
    assert all(row["python"] < 256 for row in found["rows"])


def test_another_study_in_the_same_folder_is_refused_and_changes_nothing(place):
    """The imported run there is the other model's."""
    run(place, "anytime")
    before = (place / "out" / "results.json").read_bytes()
    shutil.copytree(place / "model", place / "other")
    done = start(place, "--model", place / "other", "--out", place / "out")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("experiment: ") and last.endswith(
        "has model 'model', and this is 'other'; give another --out"
    )
    assert (place / "out" / "results.json").read_bytes() == before


@pytest.mark.parametrize("name, value", [
    ("model", "other"), ("calibration_tokens", 512),
    ("held_out_tokens", {"wikipedia": 448, "python": 448}),
])  # fmt: skip
def test_rows_are_of_one_model_and_as_many_tokens(name, value):
    about = {"model": "m", "calibration_tokens": 16_384, "rows": []}
    about["held_out_tokens"] = {"wikipedia": 196_608, "python": 196_494}
    study = object.__new__(e010.Experiment)
    study.file, study.results = Path("results.json"), dict(about)
    study.agree(**about)
    with pytest.raises(ConfigError, match=rf"^results.json has {name} .*another --out"):
        study.agree(**{**about, name: value})
    assert study.results == about


@pytest.mark.parametrize("words, said", [
    (["--ours"], "--ours needs --python FOLDER"),
    (["--model", "m", "--python", "texts"], "--python is of --ours"),
])  # fmt: skip
def test_pythons_texts_go_with_our_model(words, said, tmp_path, capsys):
    out = tmp_path / "none"
    with pytest.raises(SystemExit) as stop:
        e010.main([*words, "--articles", "a", "--out", str(out)])
    assert stop.value.code == 2 and not out.exists()
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_texts_that_are_not_there_are_named(tmp_path):
    (tmp_path / "articles").write_text("")
    gone = tmp_path / "gone"
    with pytest.raises(ConfigError, match=f"{gone} isn't there; --ours takes"):
        write_texts(tmp_path / "articles", gone, tmp_path / "texts")


def test_tables_have_a_row_a_method_and_mark_the_best_of_a_cut():
    row = lambda method, cut, value, **more: {
        "method": method, "allocate": None, "cut": cut, "blocks": 1 - cut,
        "wikipedia": value, "python": 2 * value, **more,
    }  # fmt: skip
    dense = {"method": "dense", "cut": 0.0, "wikipedia": 10.0, "python": 20.0}
    ranked = {"rank": 7, "blocks": 0.99, "wikipedia": 10.1, "python": 600.0}
    found = tables([
        dense, row("depth", 0.2, 15.0), row("modegpt", 0.2, 12.0, allocate="curve"),
        row("modegpt", 0.1, 11.0, allocate="curve"), {"method": "svd", **ranked},
    ])  # fmt: skip
    assert "dense is 10.00 / 20.00" in found
    lines = found.splitlines()
    assert (
        "| modegpt | curve | **11.00** / **22.00** | **12.00** / **24.00** |" in lines
    )
    assert "| depth |  |  | 15.00 / 30.00 |" in lines
    assert "| svd | rank 7 | 99.0% | 10.10 / 600.00 | +1.00% / 30 times |" in lines
    assert (
        "| modegpt | curve, 10% | 90.0% | 11.00 / 22.00 | +10.00% / +10.00% |" in lines
    )


def test_directions_and_the_largest_channel_of_a_known_moment(rng):
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    moment = rotation @ np.diag([90.0, 8.0, 1.5, 0.5]) @ rotation.T
    assert [directions(moment, share) for share in (0.5, 0.95, 0.99)] == [1, 2, 3]
    assert largest_share(np.diag([3.0, 1.0])) == 0.75


def test_a_call_without_time_for_the_dense_row_draws_nothing(tmp_path):
    write_summary(tmp_path, {"rows": []})
    write_summary(tmp_path, {"rows": [{"method": "dense", "refused": "no"}]})
    assert not list(tmp_path.iterdir())
