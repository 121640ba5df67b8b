"""A file of speeds: each row says which commit it is of, and all are of one kind."""

import argparse
from types import SimpleNamespace

import pytest

from benchmarks import bench_compress
from tests.compress.test_apply import WIDE
from tests.decompose.test_exact import draw
from uoe_jax.compress.observed import Smaller
from uoe_jax.files import read_json
from uoe_jax.model import with_params


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """What makes a bench of a commit and other options; nothing is timed."""
    model = with_params(WIDE, draw(WIDE, 1), {})
    run = SimpleNamespace(config=SimpleNamespace(name="wide"), model=model)
    observed = SimpleNamespace(model=WIDE), {"statistics": 1.0}
    monkeypatch.setattr(bench_compress, "load_run", lambda folder: run)
    monkeypatch.setattr(bench_compress, "look", lambda run, args: observed)
    timed = lambda made, batch, args: {"batch": batch}
    monkeypatch.setattr(bench_compress, "time_model", timed)
    usual = {"run": "RUN", "out": tmp_path / "speeds.json", "calibrate": 16_384,
             "prompt": 512, "new": 128, "minutes": 9.0}  # fmt: skip

    def make(commit, **options):
        given = usual | {"batches": [1]} | options
        return bench_compress.Bench(argparse.Namespace(commit=commit, **given))

    return make


def test_a_row_has_the_commit_of_the_call_that_timed_it(bench, tmp_path):
    for commit, batches in (("first", [1]), ("second", [1, 32])):
        made = bench(commit, batches=batches)
        assert isinstance(made.dense, Smaller)
        made.put({"method": "dense", "cut": 0.0}, made.dense)
    found = read_json(tmp_path / "speeds.json")
    rows = [(row["batch"], row["commit"]) for row in found["rows"]]
    assert rows == [(1, "first"), (32, "second")]


def test_rows_of_another_text_or_jax_are_not_added(bench, monkeypatch):
    made = bench("first")
    made.put({"method": "dense", "cut": 0.0}, made.dense)
    with pytest.raises(SystemExit, match="has calibrate 16384, and this is 512; give"):
        bench("second", calibrate=512)
    monkeypatch.setattr("jax.__version__", "0.0.1")
    with pytest.raises(SystemExit, match="and this is '0.0.1'; give another --out"):
        bench("second")
