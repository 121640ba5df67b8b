"""Runs that earlier versions wrote load, evaluate and go on to the same numbers."""

import tarfile
from pathlib import Path

import pytest

from uoe_jax.evaluate import evaluate
from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.runs.load import load_run
from uoe_jax.train import train
from uoe_jax.train.metrics import read_metrics
from uoe_jax.validation import validate

GOLDENS = Path(__file__).parents[1] / "goldens"
# By version: what it logged of a tiny union's run, which it left at step 4 of 6. A new
# version that changes what a checkpoint holds adds a run of its own here.
LOGGED = {
    "0.1.0": {"valid 4": 5.8008339, "train 5": 5.8510952, "train 6": 5.7692158,
              "valid 6": 5.7889934},
}  # fmt: skip


@pytest.mark.parametrize("version", LOGGED)
def test_a_run_of_an_earlier_version_goes_on(version, tmp_path, monkeypatch):
    with tarfile.open(GOLDENS / f"run-{version}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    logged, run = LOGGED[version], tmp_path / "run"
    loaded = load_run(run)
    validate(loaded.config)
    assert loaded.step == 4
    found = evaluate(loaded.model, loaded.config, max_batches=2)
    # Another processor, another compiler: rounding, no more.
    assert found["loss"] == pytest.approx(logged["valid 4"], abs=1e-4)
    train(loaded.config, run, quiet=True)
    assert Checkpoints(run / "checkpoints").steps() == [4, 6]
    lines = {
        f"{'valid' if line['kind'] == 'eval' else 'train'} {line['step']}": line["loss"]
        for line in read_metrics(run / "metrics.jsonl")
    }
    for name, loss in logged.items():
        assert lines[name] == pytest.approx(loss, abs=1e-4), name
