"""Help: on one screen, each option its own text; presets; configs as files."""

import json
from collections import Counter
from dataclasses import dataclass, fields

import pytest

from tests.cli.options import CLASSES, load
from uoe_jax.cli import VERBS, main
from uoe_jax.cli.fields import option_names
from uoe_jax.cli.help import field_texts, list_options
from uoe_jax.cli.parse import USUAL
from uoe_jax.cli.train import TrainOptions
from uoe_jax.config import UnionConfig, from_json
from uoe_jax.presets import PRESETS


def shown(capsys, *args):
    """What a command that succeeds prints."""
    assert main(list(args)) == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def usual_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("verb", CLASSES)
def test_every_option_has_a_text_of_its_own(verb):
    texts = {o.name: o.text for o in list_options(load(verb))}
    assert not [name for name, text in texts.items() if len(text) < 3]
    double = [text for text, count in Counter(texts.values()).items() if count > 1]
    assert not double


def test_options_of_the_help_are_those_that_are_typed():
    listed = {o.name.replace("[no-]", "") for o in list_options(TrainOptions)}
    typed = {n for n in option_names(TrainOptions) if "--no-" not in n}
    assert listed == {n for n in typed if ".no-" not in n}


def test_a_comment_is_of_the_field_beside_or_below_it_alone():
    @dataclass
    class Fields:
        # Above, on
        # two lines.
        first: int = 0
        second: int = 1
        third: tuple[int, ...] = (
            1,  # inside
        )
        fourth: int = 2  # beside

    assert field_texts(Fields) == {
        "first": "Above, on two lines.",
        "second": "",
        "third": "inside",
        "fourth": "beside",
    }


def test_train_shows_one_screen_and_the_rest_on_request(capsys):
    short = shown(capsys, "train", "tiny", "--help")
    assert len(short.splitlines()) <= 60
    assert max(map(len, short.splitlines())) <= 80
    assert short.startswith("usage: uoe train PRESET|RUN|--config FILE [OPTIONS]")
    for option in ("--run-dir", "--train.steps", "--model.d-model", "model.union ("):
        assert option in short
    assert "--model.norm-eps" not in short
    whole = shown(capsys, "train", "tiny", "--help-all")
    for option in list_options(TrainOptions):
        assert f"  {option.name}" in whole
    assert "[swiglu]" in shown(capsys, "train", "1b", "--help-all")


@pytest.mark.parametrize(
    "args",
    [
        ("train", "tiny", "--help", "model.union"),
        ("train", "--help", "model.union"),
        ("help", "train", "model.union"),
        ("help", "train", "--model.union."),
    ],
)
def test_a_group_of_options(args, capsys):
    lines = shown(capsys, *args).splitlines()
    options = [line for line in lines if line.startswith("  --")]
    assert options[0].startswith("  --model.union.num-experts INT")
    assert all(line.startswith("  --model.union.") for line in options)
    assert len(options) == len(fields(UnionConfig))


def test_an_unknown_group_is_refused(capsys):
    assert main(["help", "train", "model.unoin"]) == 2
    assert "did you mean model.union" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_help_verb_is_the_verbs_help(verb, capsys):
    assert shown(capsys, "help", verb) == shown(capsys, verb, "--help")


@pytest.mark.parametrize("verb", ["train", "data", "plan", "cost", "config"])
def test_usage_lines_name_the_preset(verb, capsys):
    assert "PRESET" in shown(capsys, verb, "--help").splitlines()[0]


def test_presets_are_listed_with_their_sizes(capsys):
    table = shown(capsys, "presets")
    for name in PRESETS:
        assert f"\n{name} " in table
    assert "sized-N" in table
    found = json.loads(shown(capsys, "presets", "--json"))
    assert found["tiny-union"]["parameters"] == 828_544
    assert found["tiny-mod"]["mlp"] == "dense in mod blocks"
    assert set(found) == set(PRESETS)


def test_a_config_file_stands_for_a_preset(tmp_path, capsys):
    text = shown(capsys, "config", "tiny-union", "--name", "mine",
                 "--model.union.top-k", "2")  # fmt: skip
    config = from_json(text)
    assert config.name == "mine" and config.model.union.top_k == 2
    file = tmp_path / "my.json"
    file.write_text(text)
    found = json.loads(shown(capsys, "cost", "--config", str(file), "--json"))
    assert found["name"] == "mine"
    again = shown(capsys, "config", f"--config={file}", "--name", "other")
    assert from_json(again).model == config.model


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--config", "nowhere.json"], "nowhere.json can't be read"),
        (["--config"], "--config has no value"),
        (["tiny", "--config", "my.json"], "tiny with --config my.json; give a preset"),
        (["--config", "bad.json"], "bad.json: ExperimentConfig has no field 'modle'"),
        (["--config", "gs://b/c.json"], "gs://b/c.json"),
    ],
)
def test_config_files_that_cant_be_are_refused(
    args, says, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text('{"modle": {}}')
    assert main(["cost", *args]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["train", "tiny", "--lr", "1"], "--optim.learning-rate"),
        (["train", "tiny", "--optim.lr", "1"], "--optim.learning-rate"),
        (["train", "tiny", "--bs", "8"], "--data.batch-size"),
        (["train", "tiny", "--batch", "8"], "--data.batch-size"),
        (["train", "tiny", "--epochs", "8"], "--train.steps"),
        (["train", "tiny", "--layers", "8"], "--model.num-layers"),
        (["train", "tiny", "--heads", "8"], "--model.num-heads"),
        (["train", "tiny", "--experts", "8"], "--model.union.num-experts"),
        (["train", "tiny", "--device", "cpu"], "--devices"),
        (["train", "tiny", "--out", "x"], "--run-dir"),
        (["train", "tiny", "--steps", "8"], "--train.steps"),
        (["decompose", "x", "--num-experts", "8"], "--experts"),
        (["generate", "x", "--max-tokens", "8"], "--max-new-tokens"),
        (["list"], "presets"),
        (["evaluate", "x"], "eval"),
        (["sample", "x"], "generate"),
        (["convert", "x"], "import or export"),
        (["adapt", "x", "--data.path", "y"], "--data?"),
        (["adapt", "x", "--dataset", "y"], "--data?"),
    ],
)
def test_the_fields_usual_words_are_understood(args, meant, capsys):
    assert main(args) == 2
    assert f"did you mean {meant}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "fix"),
    [
        (["export", "x", "--out", "y"], "FOLDER is given without a name"),
        (["export", "x", "--to", "y"], "FOLDER is given without a name"),
        (["complete", "--file", "x.csv"], "FILE is given without a name"),
        (["generate", "--run", "x"], "RUN is given without a name"),
        (["data", "--list"], "uoe presets does that"),
    ],
)
def test_what_has_no_name_is_no_option(args, fix, capsys):
    assert main(args) == 2
    assert fix in capsys.readouterr().err


def test_usual_words_lead_to_options_that_are_there():
    known = {"--devices", "--debug"}.union(*(option_names(load(v)) for v in CLASSES))
    for word, options in USUAL.items():
        assert set(options) <= known, word
