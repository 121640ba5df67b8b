"""One line and exit 2 for every bad request; help and cost start without jax."""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

from uoe_jax.cli import VERBS, main, usage
from uoe_jax.cli.cost import count_all
from uoe_jax.cli.fields import option_names
from uoe_jax.cli.parse import flatten, parse, take_preset
from uoe_jax.cli.train import TrainOptions
from uoe_jax.errors import ConfigError
from uoe_jax.hardware import count
from uoe_jax.presets import get_preset


def complaint(capsys, *args):
    """Run a command that must fail; return its only line."""
    code = main(args)
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    return lines[0]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["trian"], ["'trian'", "did you mean train"]),
        (["train"], ["takes a preset first", "digits-vit"]),
        (["train", "tinny"], ["'tinny'", "tiny"]),
        (
            ["train", "tiny", "--model.dmodel", "9"],
            ["--model.dmodel", "--model.d-model"],
        ),
        (["train", "tiny", "--d-model", "9"], ["did you mean --model.d-model"]),
        (["train", "tiny", "--model.union.topk=3"], ["--model.union.top-k"]),
        (["train", "tiny", "--zzzzz", "9"], ["--help lists the options"]),
        (["train", "tiny", "--model.d-model", "x"], ["'x'", "a whole number"]),
        (["train", "tiny", "--model.d-model", "3.5"], ["'3.5'", "a whole number"]),
        (["train", "tiny", "--optim.eps", "tiny"], ["'tiny'", "a number"]),
        (["train", "tiny", "--model.d-model"], ["--model.d-model", "value"]),
        (["train", "tiny", "--model.norm", "batch"], ["'batch'", "rmsnorm"]),
        (["train", "tiny", "--model.mlp", "dense", "x"], ["'x'", "moe"]),
        (["train", "tiny", "spare"], ["spare"]),
        (["train", "tiny-union", "--model.union.top-k", "9"], ["top_k", "9"]),
        (["cost", "tiny", "--batch", "0"], ["--batch is 0", "at least 1"]),
        (["eval"], ["run"]),
        (["eval", "nowhere"], ["nowhere", "config.json"]),
        (["report"], ["run"]),
        (["generate", "nowhere", "--prompt", "x"], ["nowhere"]),
        (["leakcheck", "tinny"], ["'tinny'", "tiny"]),
    ],
)
def test_bad_request_is_one_line_that_says_the_fix(
    args, parts, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    line = complaint(capsys, *args)
    for part in parts:
        assert part in line
    assert not list(tmp_path.iterdir()), "a refused request left files"


def test_narrow_terminals_still_get_one_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    line = complaint(capsys, "cost", "tiny", "--model.norm", "batch")
    assert "'batch'" in line and "'layernorm'" in line


def test_traceback_only_with_debug(capsys):
    assert main(["train", "tinny", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert main(["--debug", "train", "tinny"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_unexpected_errors_are_one_line_and_exit_1(capsys, monkeypatch):
    def fail(args):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("uoe_jax.cli.cost.cost", fail)
    assert main(["cost", "tiny"]) == 1
    line = capsys.readouterr().err
    assert line == "uoe: RuntimeError: two lines; --debug shows the traceback\n"


def test_os_errors_name_the_file_and_exit_2(capsys, monkeypatch):
    def fail(args):
        raise PermissionError(13, "Permission denied", "/locked")

    monkeypatch.setattr("uoe_jax.cli.cost.cost", fail)
    assert main(["cost", "tiny"]) == 2
    assert capsys.readouterr().err == "uoe: Permission denied: /locked\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert f"usage: uoe {verb}" in capsys.readouterr().out


def test_usage_names_every_verb():
    for verb in VERBS:
        assert f"  {verb} " in usage()


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["cost", "--help"],
        ["cost", "7b-union"],
        ["train", "--help"],
        ["train", "tiny", "--x", "1"],
    ],
)
def test_light_commands_never_import_jax(args):
    code = (
        "import sys; from uoe_jax.cli import main; main(sys.argv[1:]);"
        # numpy may be there: the model of products is trees of arrays.
        "heavy = {'jax', 'flax', 'matplotlib'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True)
    assert done.returncode == 0, done.stderr


def test_overrides_reach_the_config():
    args = [
        "--model.d-model",
        "96",
        "--model.attention",
        "union",
        "dense",
        "--optim.learning-rate=1e-2",
        "--model.use-bias",
        "--data.path",
        "x.txt",
        "--train.max-seconds",
        "3",
        "--name",
        "mine",
        "--run-dir",
        "here",
    ]
    found = parse(
        TrainOptions, args, "train", default=TrainOptions(config=get_preset("tiny"))
    )
    assert found.config.model.d_model == 96
    assert found.config.model.attention == ("union", "dense")
    assert found.config.model.use_bias is True
    assert found.config.optim.learning_rate == 1e-2
    assert found.config.data.path == "x.txt"
    assert found.config.train.max_seconds == 3.0
    assert found.config.name == "mine"
    assert str(found.run_dir) == "here"
    assert found.config.model.d_ff == get_preset("tiny").model.d_ff


def test_every_field_of_a_config_has_its_option():
    names = set(option_names(TrainOptions))
    for name in (
        "--model.union.top-k",
        "--model.no-use-bias",
        "--mesh.data",
        "--name",
        "--train.z-loss",
        "--run-dir",
        "--no-resume",
    ):
        assert name in names


def test_take_preset_gives_help_something_to_show():
    config, rest = take_preset(["--help"], "train")
    assert config.name == "tiny" and rest == ["--help"]


@pytest.mark.parametrize(
    "box",
    [
        "╭─ Value error ─────────────────╮\n"
        "│ Error parsing --x: invalid    │\n"
        "│ literal for int() with base   │\n"
        "│ 10: 'y'                       │\n"
        "│ ───────────────────────────── │\n"
        "│ For full helptext, run --help │\n"
        "╰───────────────────────────────╯\n",
        " Value error\n -----------------------\n  Error parsing --x: invalid literal\n"
        "  for int() with base 10: 'y'\n  ----------------\n  For full helptext\n",
    ],
    ids=["line characters", "ascii"],
)
def test_boxes_become_one_line(box):
    assert flatten(box) == "--x is 'y'; it takes a whole number"


def test_unknown_parser_messages_survive_whole():
    @dataclass
    class Options:
        kind: Literal["a", "b"]

    with pytest.raises(ConfigError, match="kind"):
        parse(Options, [], "x")
    assert flatten("two\n words.") == "two words"


def test_cost_reports_what_hardware_count_counts(capsys):
    model = get_preset("small-union").model
    assert main(["cost", "small-union", "--json", "--batch", "3", "--seq-len=64"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["params"]["total"] == sum(count.count_params(model).values())
    flops = count.flops_per_token(model, 64)
    assert found["flops_per_token"]["forward"] == flops.forward
    assert found["flops_per_step"] == flops.training * 3 * 64
    assert found["bytes"]["kv_cache"] == count.cache_bytes(model, 3, 64)


def test_cost_tables_line_up(capsys):
    assert main(["cost", "1b"]) == 0
    blocks = capsys.readouterr().out.strip().split("\n\n")
    assert len(blocks) == 4
    for block in blocks[1:]:
        header, rule, *rows = block.splitlines()
        assert set(rule) <= {"-", " "}
        assert all(len(row) <= len(rule) for row in (header, *rows))


def test_cost_counts_vision_in_patches():
    assert count_all(get_preset("digits-vit"))["seq_len"] == 16
