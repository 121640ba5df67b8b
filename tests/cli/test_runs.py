"""The verbs on a real, tiny run."""

import dataclasses
import importlib
import json
import shutil

import pytest

from tests.compare import assert_close
from uoe_jax.cli import main
from uoe_jax.config import config_hash
from uoe_jax.errors import ConfigError
from uoe_jax.presets import PRESETS, get_preset
from uoe_jax.probes import scaled_down
from uoe_jax.runs.find import find_run, run_or_preset
from uoe_jax.validation import find_problems


def test_train_writes_the_run_and_its_page(union_run):
    for name in ("config.json", "env.json", "metrics.jsonl", "report.html"):
        assert (union_run / name).is_file()
    plots = {path.stem for path in (union_run / "plots").iterdir()}
    assert {"loss", "bits_per_byte", "load", "entropy", "routing"} <= plots


def test_eval_agrees_with_the_trainers_last_validation(union_run, capsys):
    assert main(["eval", str(union_run), "--max-batches", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    lines = [json.loads(x) for x in (union_run / "metrics.jsonl").open()]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    assert found["step"] == last["step"] == 4
    # The same batches through the same compiled function: rounding only.
    assert_close(found["loss"], last["loss"], 1e-5)
    assert_close(found["bits_per_byte"], last["bits_per_byte"], 1e-5)


def test_eval_tables_show_every_routed_layer(union_run, capsys):
    assert main(["eval", str(union_run), "--max-batches", "1"]) == 0
    out = capsys.readouterr().out
    assert "bits per byte" in out
    rows = [
        x.split()[:2] for x in out.splitlines() if x.startswith(("attention", "mlp"))
    ]
    assert rows == [["attention", "0"], ["mlp", "0"]]


def test_generate_continues_the_prompt_and_depends_on_the_seed_only(union_run, capsys):
    args = ["generate", str(union_run), "--prompt", "def", "--max-new-tokens", "12"]
    said = []
    for seed in ("3", "3", "4"):
        assert main([*args, "--temperature", "1.5", "--seed", seed]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert all(text.startswith("def") for text in said)
    assert main([*args, "--greedy"]) == 0
    greedy = capsys.readouterr().out
    assert main([*args, "--top-k", "1", "--seed", "9"]) == 0
    assert capsys.readouterr().out == greedy


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--prompt", ""], "empty"),
        (["--prompt", "x", "--max-new-tokens", "32"], "max_seq_len 32"),
        (["--prompt", "x", "--top-p", "2", "--max-new-tokens", "4"], "--top-p is 2"),
        (["--prompt", "x", "--split", "valid"], "--split"),
    ],
)
def test_generate_refuses_in_one_line(union_run, capsys, options, part):
    assert main(["generate", str(union_run), *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and part in lines[0]


def test_leakcheck_of_a_preset_moves_nothing(capsys):
    assert main(["leakcheck", "digits-vit-union"]) == 0
    assert "nothing moved" in capsys.readouterr().out


def test_leakcheck_of_a_run_takes_its_trained_model_as_it_is(union_run, monkeypatch):
    seen = []

    def check(model, key, *, length):
        seen.append((model.config, length))
        return []

    monkeypatch.setattr(
        importlib.import_module("uoe_jax.leakcheck"), "leakcheck", check
    )
    assert main(["leakcheck", str(union_run), "--length", "8"]) == 0
    assert seen == [(run_or_preset(str(union_run))[1].model, 8)]


def test_leakcheck_exits_1_when_something_moved(capsys, monkeypatch):
    leakcheck = importlib.import_module("uoe_jax.leakcheck")
    found = leakcheck.Finding("future", "tokens after t", "logits at 3", 0.5, False)
    monkeypatch.setattr(leakcheck, "leakcheck", lambda *a, **k: [found])
    assert main(["leakcheck", "digits-vit"]) == 1
    assert "LEAK" in capsys.readouterr().out


@pytest.mark.parametrize("name", PRESETS)
def test_scaled_down_presets_keep_their_structure(name):
    full = get_preset(name)
    small = scaled_down(full.model)
    tokenized = dataclasses.replace(full.data, tokenizer="byte")
    rebuilt = dataclasses.replace(full, model=small, data=tokenized)
    assert not list(find_problems(rebuilt))
    assert set(small.layer_kinds) == set(full.model.layer_kinds)
    assert small.num_query_groups == full.model.num_query_groups
    for part in ("union", "moe"):
        ours, theirs = getattr(small, part), getattr(full.model, part)
        assert (ours.num_experts, ours.top_k) == (theirs.num_experts, theirs.top_k)
    patterns = (small.attention, small.mlp, small.blocks)
    assert small.d_model <= 64 and small.num_layers <= 2 * max(map(len, patterns))


def test_data_describes_and_as_json(text_file, capsys):
    args = ["data", "tiny", "--data.path", str(text_file),
            "--data.cache-dir", str(text_file.parent)]  # fmt: skip
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "train" in out and "first training example" in out
    assert main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["splits"]) == {"train", "valid", "test"}


def test_missing_and_empty_data_are_refused(tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.touch()
    for path in (tmp_path / "none.txt", empty):
        for verb in ("data", "train"):
            args = [verb, "tiny", "--data.path", str(path)]
            run = ["--run-dir", str(tmp_path / "r")] if verb == "train" else []
            assert main([*args, *run]) == 2
            lines = capsys.readouterr().err.splitlines()
            assert len([x for x in lines if x.startswith("uoe: ")]) == 1
            assert path.name in lines[-1]


def test_a_folder_of_another_run_is_refused(union_run, capsys):
    args = ["train", "tiny", "--run-dir", str(union_run), "--quiet"]
    assert main(args) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "another config" in lines[0]


def test_report_puts_runs_side_by_side(union_run, tmp_path, capsys):
    out, run = tmp_path / "both.html", tmp_path / "run"
    run.mkdir()
    shutil.copy(union_run / "config.json", run)
    # Pictures of routers, which take long to draw, are on the page of the run itself.
    lines = [json.loads(line) for line in (union_run / "metrics.jsonl").open()]
    kept = [{k: v for k, v in line.items() if k != "router"} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in kept))
    assert main(["report", str(run), str(run), "--out", str(out), "--no-overlay"]) == 0
    assert capsys.readouterr().out == f"report: {out}\n"
    assert "2 runs side by side" in out.read_text()


def test_runs_are_found_by_path_and_by_name(union_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_run(str(union_run)) == union_run
    (tmp_path / "runs").symlink_to(union_run.parent)
    assert str(find_run("union")) == "runs/union"
    with pytest.raises(ConfigError, match="did you mean runs/union"):
        find_run("unoin")
    folder, config = run_or_preset("union")
    assert folder is not None
    assert config_hash(run_or_preset("tiny")[1]) == config_hash(get_preset("tiny"))
    assert config.model.d_model == 16
