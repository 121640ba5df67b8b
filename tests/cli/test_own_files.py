"""A run's own files are read as strictly as what is typed: nothing is guessed."""

import json
import shutil

import pytest

from uoe_jax.cli import main
from uoe_jax.errors import CheckpointError
from uoe_jax.files import read_json_lines
from uoe_jax.runs.folder import CHECKPOINTS, check_saved
from uoe_jax.runs.load import load_run
from uoe_jax.validation import read_config


@pytest.fixture
def run(union_run, tmp_path):
    return shutil.copytree(union_run, tmp_path / "run")


def edit(run, **fields):
    """Change fields of a run's config.json by dotted names, `optim__beta1=0.5`."""
    file = run / "config.json"
    config = json.loads(file.read_text())
    for name, value in fields.items():
        *path, last = name.split("__")
        part = config
        for key in path:
            part = part[key]
        assert part[last] != value
        part[last] = value
    file.write_text(json.dumps(config))


def refusal(capsys, *args):
    capsys.readouterr()
    assert main([str(a) for a in args]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1, said.err
    return said.err


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("optim__learning_rate", 0.02, "optim.learning_rate is 0.02, was 0.003"),
        ("optim__beta2", 0.9, "optim.beta2 is 0.9, was 0.95"),
        ("data__seed", 7, "data.seed is 7, was 0"),
        ("data__batch_size", 4, "data.batch_size is 4, was 8"),
        ("data__pack", "documents", "data.pack is 'documents', was 'stream'"),
        ("train__seed", 3, "train.seed is 3, was 0"),
        ("train__label_smoothing", 0.1, "train.label_smoothing is 0.1, was 0.0"),
        ("model__union__top_k", 2, "model.union.top_k is 2, was 4"),
    ],
)
def test_a_config_that_isnt_the_checkpoints_is_refused_on_resume(
    run, field, value, shown, capsys
):
    edit(run, **{field: value})
    args = ("train", run, "--train.steps", 6, "--mesh.data", 1, "--no-report")
    line = refusal(capsys, *args)
    assert shown in line and "config.json isn't of the run that was trained" in line
    assert sorted(p.name for p in (run / CHECKPOINTS).iterdir()) == ["4"]


def test_what_a_run_may_change_and_where_its_data_lies_isnt_compared(run):
    edit(run, train__steps=9, train__save_every=1, mesh__data=2, name="other")
    edit(run, data__cache_dir="/elsewhere", data__path="/moved.txt", train__wandb=True)
    assert load_run(run).step == 4


def test_reading_a_run_compares_too(run, capsys):
    edit(run, data__valid_fraction=0.1)
    for args in (["eval", run], ["generate", run, "--prompt", "x"]):
        assert "data.valid_fraction is 0.1, was 0.05" in refusal(capsys, *args)


def test_a_run_made_of_another_may_change_before_its_first_save(run, tmp_path):
    made = tmp_path / "dense"
    args = ["decompose", str(run), "--merge", "--out", str(made), "--json"]
    assert main(args) == 0
    edit(made, optim__learning_rate=0.02, data__batch_size=4)
    assert load_run(made).step == 4
    # It began to train, and was killed before its first save.
    (made / "metrics.jsonl").write_text('{"kind": "train", "step": 5, "loss": 1.0}\n')
    assert load_run(made).step == 4
    saved = json.loads((run / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"optim.learning_rate is 0\.02"):
        check_saved(made, read_config(made), saved | {"model": {}}, 5)
    edit(made, model__norm_eps=0.5)
    with pytest.raises(CheckpointError, match=r"model.norm_eps is 0\.5"):
        load_run(made)


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "data.json", "env.json", "tokenizer.json", "checkpoints", "best"],
)
def test_a_folder_in_place_of_a_file_is_refused_by_every_verb(run, name, capsys):
    place = run / name
    if place.is_dir():
        shutil.rmtree(place)
        place.write_text("x")
    else:
        place.unlink(missing_ok=True)
        place.mkdir()
    kind = "folder" if name in ("checkpoints", "best") else "file"
    for args in (
        ["train", run, "--train.steps", "6", "--no-report", "--quiet"],
        ["eval", run],
        ["generate", run, "--prompt", "x"],
        ["report", run],
        ["leakcheck", run],
        ["decompose", run, "--merge", "--out", run / "dense"],
        ["adapt", run, "--out", run / "adapter", "--steps", "1"],
    ):
        assert f"{place} is not a {kind}" in refusal(capsys, *args)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("data.json", {"tokenizer": {"name": "byte", "vocab_size": -1}}, "size -1"),
        ("data.json", {"settings": 3}, "settings is 3"),
        ("data.json", {"path": 7}, "path is 7"),
        ("data.json", {"classes": 5}, "classes is 5"),
        ("data.json", {"source": None}, "source is None"),
        ("config.json", {"mesh": {"fsdp": 0}}, "mesh.fsdp is 0"),
        ("config.json", {"mesh": {"data": -1}}, "mesh.data is -1"),
        ("config.json", {"data": {"path": ""}}, "data.path is empty"),
    ],
)
def test_odd_values_are_refused_by_every_verb(run, file, content, words, capsys):
    path = run / file
    path.write_text(json.dumps(json.loads(path.read_text()) | content))
    for args in (
        ["train", run, "--train.steps", "6", "--no-report", "--quiet"],
        ["eval", run],
        ["generate", run, "--prompt", "x"],
    ):
        assert words in refusal(capsys, *args)


ODD_LINES = (
    '{"kind": "train", "step": 3, "loss": "low"}',
    '{"kind": "train", "step": 3, "loss": true}',
    '{"kind": "train", "step": 3, "seconds": [1]}',
    '{"kind": "train", "step": 3, "loss": 1.0, "router": 5}',
    '{"kind": "eval", "step": 3, "split": 5, "loss": 1.0}',
    '{"kind": "eval", "step": -3, "loss": 1.0}',
    '{"kind": ["eval"], "step": 3, "loss": 1.0}',
    '{"kind": "eval", "step": 3.0, "loss": 1.0}',
)


def test_lines_of_wrong_types_are_no_metrics(tmp_path):
    file = tmp_path / "metrics.jsonl"
    good = (
        '{"kind": "train", "step": 1, "loss": null, "router": {"mlp": {}}}',
        '{"kind": "eval", "step": 2, "split": "valid", "loss": 3, "mfu": 0.5}',
    )
    file.write_text("\n".join([good[0], *ODD_LINES, good[1]]) + "\n")
    found = read_json_lines(file, step=True)
    assert [r["step"] for r in found.records] == [1, 2]
    assert found.broken == list(range(2, 2 + len(ODD_LINES)))


def test_a_report_says_which_lines_it_left_out(run, capsys):
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n".join(ODD_LINES) + "\n")
    count = len((run / "metrics.jsonl").read_text().splitlines())
    assert main(["report", str(run), "--no-overlay"]) == 0
    said = capsys.readouterr().err
    first = count - len(ODD_LINES) + 1
    assert f"lines {first}, {first + 1}, " in said and "hold no metrics" in said
