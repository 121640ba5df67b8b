"""Each option of `uoe train` and `uoe leakcheck` does what it says, as a command."""

import json

import pytest

from uoe_jax.cli import main
from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.train.metrics import read_metrics


@pytest.fixture(scope="module")
def train(text_file, tmp_path_factory):
    """Run `uoe train tiny` on small sizes in one folder; returns the exit status."""
    run = tmp_path_factory.mktemp("options") / "run"
    sizes = {"d-model": 16, "d-ff": 32, "num-layers": 1, "num-heads": 2,
             "num-kv-heads": 2, "head-dim": 4, "max-seq-len": 32}  # fmt: skip
    args = [x for name, value in sizes.items() for x in (f"--model.{name}", str(value))]
    args += ["--data.path", str(text_file), "--data.cache-dir", str(text_file.parent),
             "--data.batch-size", "8", "--train.save-every", "2",
             "--train.eval-batches", "1", "--train.keep-checkpoints", "3"]  # fmt: skip

    def train(*options, folder=run):
        return main(["train", "tiny", "--run-dir", str(folder), *args, *options])

    train.run = run
    return train


def steps(run):
    return Checkpoints(run / "checkpoints").steps()


def test_no_report_and_quiet(train, capsys):
    assert train("--train.steps", "4", "--no-report", "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert not (train.run / "report.html").exists()
    assert steps(train.run) == [2, 4]


def test_no_resume_refuses_a_run_that_is_there(train, capsys):
    assert train("--train.steps", "4", "--no-resume") == 2
    assert "has a run already" in capsys.readouterr().err
    assert steps(train.run) == [2, 4]


def test_resume_step_goes_on_from_there(train, capsys):
    options = ("--train.steps", "4", "--no-report", "--resume-step", "2")
    assert train(*options) == 0
    assert "resuming from step 2" in capsys.readouterr().out
    lines = list(read_metrics(train.run / "metrics.jsonl"))
    assert [x["step"] for x in lines if x["kind"] == "train"] == [1, 2, 3, 4]
    assert train(*options[:-1], "3") == 2
    assert "has no step 3; it has 2, 4" in capsys.readouterr().err


def test_layout_takes_a_file_of_plan(train, tmp_path, capsys):
    file = tmp_path / "layout.json"
    plan = ["plan", "tiny", "--topology", "v5e:2x4", "--out", str(file)]
    if main(plan) != 0:
        pytest.fail(capsys.readouterr().err)
    assert train("--layout", str(tmp_path / "none.json"), folder=tmp_path / "a") == 2
    assert "none.json" in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_distributed_without_a_cluster_is_refused(train, tmp_path, monkeypatch, capsys):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    assert train("--distributed", folder=tmp_path / "run") == 2
    assert "set JAX_COORDINATOR_ADDRESS" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--data.path", "--data.data-dir", "--layout"])
def test_addresses_are_refused(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for address in ("gs://bucket/run", "s3://b/x", "hdfs://h/x", "file:///x"):
        assert main(["train", "tiny", option, address]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{option} is {address}; " in line and "mount the store" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    ["demo --run-dir ADDRESS", "sweep tiny --out ADDRESS", "export runs/a ADDRESS",
     "plan tiny --topology v5e:2x2 --out ADDRESS", "report runs/a --out ADDRESS"],
)  # fmt: skip
def test_what_is_no_run_does_not_lie_in_a_store(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(command.replace("ADDRESS", "gs://b/x").split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "gs://b/x" in line and "mount the store" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", ["--train.wandb=true", "--train.wandb false",
                                   "--no-report=1", "--quiet yes"])  # fmt: skip
def test_a_flag_with_a_value_is_one_line(given, capsys):
    assert main(["train", "tiny", *given.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "takes no value" in line


def test_length_and_seed_of_leakcheck(capsys):
    assert main(["leakcheck", "tiny", "--length", "9", "--seed", "3"]) == 0
    assert "9 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("count", ["0", "-1"])
def test_eval_of_no_batches_is_refused(train, count, capsys):
    assert main(["eval", str(train.run), "--max-batches", count]) == 2
    assert f"--max-batches is {count}" in capsys.readouterr().err


def test_eval_of_one_batch(train, capsys):
    assert main(["eval", str(train.run), "--max-batches", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 4
