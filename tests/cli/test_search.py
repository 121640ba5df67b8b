"""`uoe runs` on run folders made by hand, broken ones among them; recall."""

import importlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.runs.made_runs import change, make_result, make_run
from uoe_jax.cli import main
from uoe_jax.cli.recall import recall_line, remember
from uoe_jax.presets import get_preset


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with runs/ and experiments/, a broken run among them."""
    monkeypatch.chdir(tmp_path)
    for i, rate in enumerate((1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)):
        for seed in (0, 1):
            loss = 1.2 + abs(i - 2) / 10 + seed / 99
            make_run(Path("runs") / f"r{i}-{seed}", loss=loss,
                     optim__learning_rate=rate, train__seed=seed)  # fmt: skip
    make_run(Path("runs") / "union", "tiny-union", loss=1.11)
    make_result(Path("experiments/001_x/results/dense-0.json"), loss=1.45)
    broken = make_run(Path("runs") / "cut")
    (broken / "config.json").write_text('{"model": ')
    return tmp_path


def run(capsys, *args):
    """Return what a command prints, as text or JSON, and on standard error."""
    code = main([*map(str, args)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return (json.loads(out) if "--json" in args else out), err


def refused(capsys, *args):
    code = main([*map(str, args)])
    out, err = capsys.readouterr()
    assert code == 2 and not out and len(err.splitlines()) == 1, (code, out, err)
    return err


def test_all_runs_are_listed_best_first_and_broken_ones_with_a_reason(project, capsys):
    out, err = run(capsys, "runs")
    lines = out.splitlines()
    head = ["run", "loss", "parameters", "seconds", "steps", "model", "date"]
    assert lines[0].split() == head
    assert lines[2].split()[:2] == ["runs/union", "1.1100"]
    assert all(line.startswith("runs/") for line in lines[2:-1])
    assert lines[-1] == "11 runs; 1 below experiments/: uoe runs experiments"
    assert err.startswith("broken: runs/cut: runs/cut/config.json is not JSON")
    assert (project / "runs" / ".index.npz").is_file()


def test_runs_are_sorted_and_filtered_by_any_setting(project, capsys):
    out, _ = run(capsys, "runs", "--sort", "learning_rate", "--descending", "--where",
                 "mlp=dense", "optim.learning_rate>0.001", "path~runs/", "--columns",
                 "learning_rate", "seed", "--limit", "3")  # fmt: skip
    rows = [line.split() for line in out.splitlines()[2:5]]
    assert [row[0] for row in rows] == ["runs/r4-0", "runs/r4-1", "runs/r3-0"]
    assert [row[-2:] for row in rows] == [
        ["0.016", "0"],
        ["0.016", "1"],
        ["0.008", "0"],
    ]
    assert out.splitlines()[-1].startswith("3 of 11 runs; 1 below experiments/")
    out, _ = run(capsys, "runs", "runs", "experiments")
    assert out.splitlines()[-2].startswith("experiments/001_x/results/dense-0.json")
    assert out.splitlines()[-1] == "12 runs"
    found, _ = run(capsys, "runs", "runs", "--where", "loss<1.2", "--json")
    assert [r["name"] for r in found["runs"]] == ["union"]
    assert [r["name"] for r in found["broken"]] == ["cut"]


def test_experiments_are_listed_where_there_are_no_runs(project, capsys):
    shutil.rmtree("runs")
    out, _ = run(capsys, "runs")
    assert out.splitlines()[-1] == "1 runs" and "experiments/001_x" in out


def test_like_names_the_nearest_and_what_differs(project, capsys):
    found, _ = run(capsys, "runs", "like", "runs/r2-1", "-n", "2", "--json")
    assert found[0]["run"] == "runs/r2-0" and not found[0]["differences"]
    assert found[0]["similarity"] > 0.999
    out, _ = run(capsys, "runs", "like", "tiny", "--optim.learning-rate", "0.0081",
                 "--count", "1")  # fmt: skip
    assert "runs/r3-0" in out and "optim.learning_rate 0.008 -> 0.0081" in out
    out, _ = run(capsys, "runs", "like", "experiments/001_x/results/dense-0.json")
    assert out.splitlines()[3].startswith("runs/")
    changed, _ = run(capsys, "runs", "like", "r2-1", "--model.mlp", "union", "-n", "1")
    assert "runs/r2-0" in changed and "model.mlp dense -> union" in changed


def test_explain_ranks_settings_and_tells_how_both_ended(project, capsys):
    out, _ = run(capsys, "runs", "explain", "runs/r0-0", "runs/union")
    assert "model.mlp" in out and "dense" in out and "%" in out
    assert [x for x in out.splitlines() if x.startswith("loss")][0].split()[1:] == [
        "1.4000", "1.1100", "-0.29"
    ]  # fmt: skip
    found, _ = run(capsys, "runs", "explain", "r0-0", "r1-0", "--json")
    assert [d["setting"] for d in found["differences"]] == ["optim.learning_rate"]
    assert found["differences"][0]["share"] == 1.0
    out, _ = run(capsys, "runs", "explain", "r0-0", "r0-1")
    assert "the same settings; seeds 0 and 1" in out


def test_expect_gives_an_interval_or_says_why_not(project, capsys):
    found, _ = run(capsys, "runs", "expect", "tiny", "--optim.learning-rate", "0.0035",
                   "--level", "0.7", "--metric", "loss", "--json")  # fmt: skip
    assert found["low"] < found["loss"] < found["high"] and 1.1 < found["loss"] < 1.4
    out, _ = run(capsys, "runs", "expect", "tiny", "--data.path", "other.txt")
    assert out.startswith("nothing to go by: no run on the same data has a loss")


def test_a_map_and_a_page_are_written(project, capsys):
    out, _ = run(capsys, "runs", "--map", "map.png", "--page", "page.html", "--metric",
                 "bits_per_byte")  # fmt: skip
    assert "map: map.png" in out and "page: page.html" in out
    assert (project / "map.png").read_bytes().startswith(b"\x89PNG")
    text = (project / "page.html").read_text()
    for part in ("data:image/png;base64", "runs/union", "is not JSON",
                 "Nearest other configuration", "model.mlp"):  # fmt: skip
        assert part in text
    assert 'src="data:' in text and "http" not in text.replace("data:image", "")


def test_json_stays_json_where_pictures_are_written_too(project, capsys):
    found, _ = run(capsys, "runs", "--json", "--page", "p.html", "--map", "m.png")
    assert (found["page"], found["map"]) == ("p.html", "m.png")
    assert Path("p.html").is_file() and Path("m.png").is_file()


def test_a_page_escapes_what_names_say(project, capsys):
    make_run(Path("runs") / "<b>x")
    run(capsys, "runs", "--page", "page.html")
    assert "<b>x" not in Path("page.html").read_text()


def test_foreign_json_is_indexed_and_asked(project, capsys):
    folder = project / "foreign"
    folder.mkdir()
    lines = [{"kind": k, "size": s, "tags": ["x", k]} for k in "ab" for s in (1, 9, 80)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "a.jsonl").write_text(text + '{"x": NaN}\n{"kind": "a", "kind": 1}\n')
    (folder / "deep.json").write_text("[" * 1000 + "]" * 1000)
    (folder / "long.json").write_text(json.dumps({"x": "y" * (10 << 20)}))
    found, err = run(capsys, "runs", "index", folder, "--dim", "1024", "--half",
                     "--json", "--number", "fourier")  # fmt: skip
    assert found["objects"] == 6 and found["broken"] == 4
    assert found["bytes"] == (folder / ".index.npz").stat().st_size
    said = err.splitlines()
    assert len(said) == 4 and max(map(len, said)) < 400
    for part in ("NaN", "'kind' is there twice", "64 levels", "10,485,760 characters"):
        assert sum(part in line for line in said) == 1, part
    name = f"{folder}/a.jsonl:5"
    out, _ = run(capsys, "runs", "like", name, "--index", folder, "-n", "1")
    assert "a.jsonl:6" in out or "a.jsonl:4" in out or "a.jsonl:2" in out
    (project / "new.json").write_text('{"kind": "b", "size": 82, "tags": ["x", "b"]}')
    out, _ = run(capsys, "runs", "like", "new.json", "--index", folder, "-n", "1")
    assert "a.jsonl:6" in out and "size 80 -> 82" in out
    out, _ = run(capsys, "runs", "explain", name, "new.json", "--index", folder)
    assert "size" in out and "kind" not in out
    run(capsys, "runs", "index", folder, "--out", project / "other.npz")
    assert (project / "other.npz").is_file()


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--sort", "learnin_rate"], "did you mean optim.learning_rate"),
        (["--where", "loss"], "write NAME=VALUE"),
        (["--where", "mlp>union"], "give a number"),
        (["--where", "router=token"], "write which"),
        (["nowhere"], "doesn't exist"),
        (["--limit", "0"], "at least 1"),
        (["--map", "none/x.png"], "can't be written"),
        (["--page", "runs"], "is a folder"),
        (["--srot", "loss"], "no option --srot"),
        (["like", "tinny"], "tiny"),
        (["like", "runs/cut"], "is not JSON"),
        (["like", "tiny", "-n", "0"], "at least 1"),
        (["like", "experiments/001_x/results/dense-0.json", "--model.d-ff", "64"],
         "options with a preset"),
        (["explain", "tiny"], "takes two runs"),
        (["explain", "tiny", "runs/r9"], "did you mean"),
        (["expect", "tiny", "--level", "80"], "between 0 and 1"),
        (["expect"], "takes a preset first"),
        (["index", "nowhere"], "not a folder"),
        (["index"], "takes a folder"),
        (["index", "runs", "--dim", "1000"], "power of two"),
        (["like", "tiny", "--index", "runs/union"], "has no index"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_in_one_line(project, capsys, args, part):
    assert part in refused(capsys, "runs", *args)


def test_without_runs_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "uoe train tiny" in refused(capsys, "runs")
    Path("runs").mkdir()
    assert run(capsys, "runs")[0] == "0 runs\n"


def test_a_read_only_folder_is_searched_all_the_same(project, capsys, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("uoe_jax.runs.index.write_atomically", refuse)
    assert "\n11 runs; 1 below" in run(capsys, "runs")[0]
    assert not (project / "runs" / ".index.npz").exists()


def test_recall_says_what_was_tried_before_and_never_fails(project, monkeypatch):
    config = change(get_preset("tiny"), optim__learning_rate=4.1e-3)
    monkeypatch.setattr("uoe_jax.cli.recall._SECONDS", 60.0)
    for _ in range(2):  # without and with an index
        line = recall_line(config, Path("runs/new"))
        assert line is not None and line.startswith("most like runs/r2-0 (")
        assert "optim.learning_rate 0.004 -> 0.0041" in line
        assert line.endswith("; that one's loss was 1.2000")
        remember(Path("runs/new"))
    assert recall_line(config, Path("runs/r2-0")) is None  # it goes on with that run
    Path("runs/.index.npz").write_bytes(b"damaged")
    assert recall_line(config, Path("runs/new")) == line  # the runs are read anew
    monkeypatch.setattr("uoe_jax.runs.search.recall", lambda *args: 1 / 0)
    assert recall_line(config, Path("runs/new")) is None
    monkeypatch.undo()
    monkeypatch.chdir(project)
    monkeypatch.chdir("experiments")
    assert recall_line(config, Path("x")) is None
    remember(Path("x"))
    assert not Path("runs").exists()


def test_recall_stops_reading_in_time(project, monkeypatch):
    monkeypatch.setattr("uoe_jax.cli.recall._SECONDS", 0.0)
    start = time.process_time()
    recall_line(get_preset("tiny"), Path("runs/new"))
    assert time.process_time() - start < 1


def test_train_prints_the_line_unless_told_not_to(project, monkeypatch, capsys):
    trained = []
    trainer = importlib.import_module("uoe_jax.train")
    monkeypatch.setattr(trainer, "train", lambda *a, **k: trained.append(a))
    monkeypatch.setattr("uoe_jax.cli.recall._SECONDS", 60.0)
    (project / "x.txt").write_text("text " * 5000)
    args = ["train", "tiny", "--no-report", "--optim.learning-rate", "0.004"]
    assert main(args) == 0
    assert (
        "most like runs/r2-0 (similarity 1.00): the same settings"
        in capsys.readouterr().out
    )
    for silent in (["--no-recall"], ["--quiet"]):
        assert main([*args, *silent]) == 0
        assert "like runs" not in capsys.readouterr().out
    assert len(trained) == 3


def test_searching_does_not_start_jax(project):
    import subprocess

    code = (
        "import sys; from uoe_jax.cli import main\n"
        "assert main(['runs']) == 0 and main(['runs', 'like', 'tiny']) == 0\n"
        "assert 'jax' not in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert np.load(project / "runs" / ".index.npz")["vectors"].shape == (12, 2048)
