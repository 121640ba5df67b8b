"""010: the same program on a tiny model; what is there isn't made again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.e010_compression.run import OPENED, ROWS, SHARES, SMALL
from tests.interop.tiny_folders import TEXT, write_folder

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
    found = run(place, "rows", "ranks")["rows"]
    assert found[: len(first)] == first
    more = found[len(first) :]
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


def test_ours_without_its_texts_is_refused_in_a_line(place):
    done = start(place, "--ours", "--out", place / "none")
    assert done.returncode == 2 and not (place / "none" / "results.json").exists()
    assert done.stderr.splitlines()[-1].startswith("experiment: None isn't there")
