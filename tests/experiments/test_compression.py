"""010: the same program on a tiny model; what is there isn't made again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.e010_compression.run import OPENED, ROWS, SHARES
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


def run(place, *parts):
    words = [sys.executable, "-m", "experiments.e010_compression.run", "--tiny"]
    words += ["--model", place / "model", "--articles", place / "articles.jsonl"]
    words += ["--out", place / "out", "--parts", *parts]
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip
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
    assert len(more) == len(ROWS) + 2 * len(SHARES)
    assert all(row["blocks"] < 1 and row["python"] > 1 for row in more)
    ranks = [
        row["blocks"] for row in more if row.get("rank") and row["method"] == "svd"
    ]
    assert ranks == sorted(ranks, reverse=True)
