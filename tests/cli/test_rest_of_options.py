"""Options of train, decompose and data that no other test types, run to the end."""

import json

from uoe_jax.cli import main
from uoe_jax.validation import read_config


def train(text_file, *options):
    return main(
        ["train", "tiny", "--quiet", "--no-report", "--data.path", str(text_file),
         "--data.cache-dir", str(text_file.parent), "--data.batch-size", "8",
         "--model.d-model", "16", "--model.d-ff", "32", "--model.num-layers", "1",
         "--model.head-dim", "4", "--model.max-seq-len", "32", "--mesh.data", "1",
         "--train.log-every", "1", "--train.eval-every", "2", "--train.eval-batches",
         "1", "--train.save-every", "2", "--train.keep-checkpoints", "3",
         *map(str, options)]
    )  # fmt: skip


def last(run):
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"][-1]


def test_names_and_steps_to_go_on_from(text_file, tmp_path, capsys):
    run = tmp_path / "run"
    named = ("--run-dir", run, "--name", "first try")
    assert train(text_file, *named, "--train.steps", 4) == 0
    assert read_config(run).name == "first try"
    end = last(run)
    assert train(text_file, *named, "--train.steps", 4, "--no-resume") == 2
    assert "has a run already" in capsys.readouterr().err
    assert train(text_file, *named, "--train.steps", 4, "--resume-step", 2) == 0
    again = last(run)
    assert again["step"] == 4 and again["loss"] == end["loss"]
    assert train(text_file, *named, "--train.steps", 6, "--resume") == 0
    assert last(run)["step"] == 6


def test_a_run_is_cut_as_it_is_asked(text_file, tmp_path, capsys):
    run = tmp_path / "dense"
    assert train(text_file, "--run-dir", run, "--train.steps", 2) == 0
    capsys.readouterr()
    cut = ["--experts", "4", "--top-k", "2", "--grouping", "random", "--seed", "3"]
    for number, more in enumerate(
        (
            ["--parts", "mlp", "--router", "zero", "--checkpoint", "best"],
            ["--parts", "both", "--attention-experts", "2", "--checkpoint", "last"],
        )
    ):
        out = tmp_path / f"union{number}"
        asked = ["decompose", str(run), *cut, *more, "--out", str(out), "--json"]
        assert main(asked) in (0, 1)
        found = json.loads(capsys.readouterr().out)
        model = read_config(out).model
        assert model.mlp == ("union",) and found["seed"] == 3
        if number == 0:
            assert model.attention == ("dense",) and found["router"] == "zero"
        else:
            assert model.union_for("attention").num_experts == 2


def test_data_of_a_named_experiment_is_described(text_file, capsys):
    asked = ["data", "tiny", "--name", "mine", "--data.path", str(text_file)]
    cached = ["--data.cache-dir", str(text_file.parent), "--json"]
    assert main([*asked, *cached]) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["tokens"] > 0
