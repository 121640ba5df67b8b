"""`import uoe_jax as uoe`: its names, and what they do with a tiny run."""

import dataclasses
import inspect
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

import uoe_jax as uoe
import uoe_jax.config as config_module
from uoe_jax.cli import main
from uoe_jax.config import ModelConfig
from uoe_jax.errors import ConfigError
from uoe_jax.escape import escape
from uoe_jax.evaluate import evaluate as evaluate_model
from uoe_jax.hardware.count import count_params, flops_per_token
from uoe_jax.tree import named_leaves


def test_names_are_listed_without_jax_and_at_once():
    code = (
        "import sys, time; start = time.perf_counter(); import uoe_jax as uoe;"
        "names = dir(uoe); took = time.perf_counter() - start;"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules;"
        "print(took, *names)"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout.split()
        for _ in range(3)
    ]
    assert min(float(took) for took, *_ in found) < 0.1
    assert set(uoe.__all__) <= set(found[0])


@pytest.mark.parametrize("name", uoe.__all__)
def test_every_name_is_there_and_says_what_it_is(name):
    found = getattr(uoe, name)
    assert found.__doc__ and len(found.__doc__.splitlines()[0]) > 20
    if inspect.isfunction(found):
        hints = inspect.signature(found)
        assert hints.return_annotation is not inspect.Signature.empty
        for parameter in hints.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, parameter


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="uoe_jax"):
        _ = uoe.no_such_name


def test_folders_of_the_same_name_dont_hide_functions():
    code = (
        "import uoe_jax.train.loop, uoe_jax.evaluate, uoe_jax.adapt, uoe_jax as uoe;"
        "from uoe_jax.train import train as inner;"
        "import types; names = ('train', 'evaluate', 'adapt', 'generate', 'plan');"
        "assert all(type(getattr(uoe, n)) is types.FunctionType for n in names);"
        "assert inner.__module__ == 'uoe_jax.train.loop';"
        "import uoe_jax.model; assert type(uoe_jax.model) is types.ModuleType"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert isinstance(uoe.ops, types.ModuleType)


def test_make_model_takes_either_config_and_a_seed_or_a_key():
    config = uoe.get_preset("tiny-union")
    seeded = dataclasses.replace(
        config, train=dataclasses.replace(config.train, seed=7)
    )
    arrays = [
        named_leaves(model)["embed.embedding"]
        for model in (
            uoe.make_model(seeded),
            uoe.make_model(config, 7),
            uoe.make_model(config.model, 7),
            uoe.make_model(config.model, jax.random.key(7)),
        )
    ]
    for array in arrays[1:]:
        np.testing.assert_array_equal(array, arrays[0])
    other = named_leaves(uoe.make_model(config.model))["embed.embedding"]
    assert not np.array_equal(other, arrays[0])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((ModelConfig(head_dim=3),), "model.head_dim is 3"),
        ((ModelConfig(num_heads=6, num_kv_heads=4),), "num_kv_heads 4 doesn't divide"),
        ((ModelConfig(), -1), "key is -1"),
        ((ModelConfig(), 2**32), "key is 4294967296"),
    ],
)
def test_make_model_refuses_what_cant_be(args, says):
    with pytest.raises(ConfigError, match=says):
        uoe.make_model(*args)


def test_a_model_prints_on_a_few_lines_with_its_config_once():
    text = repr(uoe.make_model(uoe.get_preset("tiny-union")))
    assert "ModelConfig(attention=('union',), mlp=('union',))" in text
    assert text.count("Config(") == 1 and len(text) < 4050


def test_configs_print_what_differs_and_can_be_read_back():
    config = uoe.get_preset("1b-union").model
    assert eval(repr(config), vars(config_module)) == config
    assert repr(ModelConfig()) == "ModelConfig()"


@pytest.mark.parametrize(
    "name",
    ["tiny", "tiny-union", "tiny-mod", "tiny-moba", "tiny-moh", "1b-moe", "digits-vit"],
)
def test_show_adds_up(name, capsys):
    config = uoe.get_preset(name)
    found = uoe.show(name)
    printed = capsys.readouterr().out
    assert printed.startswith(f"{name}: ") and str(found) == printed.rstrip("\n")
    *rows, last = found.rows
    size = sum(count_params(config.model).values())
    assert sum(int(row[4].replace(",", "")) for row in rows if row[4]) == size
    assert last[4] == f"{size:,}"
    units = {"FLOP": 1.0, "kFLOP": 1e3, "MFLOP": 1e6, "GFLOP": 1e9}
    spent = [row[5].split() for row in rows if row[5]]
    total = sum(float(number) * units[unit] for number, unit in spent)
    forward = flops_per_token(config.model, config.seq_len).forward
    assert abs(total - forward) < 0.01 * forward
    assert "<table>" in found._repr_html_() and f"{size:,}" in found._repr_html_()


def test_show_of_a_model_is_that_of_its_config(capsys):
    config = uoe.get_preset("digits-vit-union")
    assert uoe.show(uoe.make_model(config)).rows == uoe.show(config.model).rows
    with pytest.raises(ConfigError, match="show takes"):
        uoe.show(3)


def test_a_run_is_trained_evaluated_and_sampled(tiny_config, tmp_path, capsys):
    config = dataclasses.replace(tiny_config(), name="mine")
    summary = uoe.train(config, tmp_path / "run", quiet=True)
    assert summary["step"] == 4
    run = uoe.load_run(tmp_path / "run")
    assert uoe.load_run(run) is run and run.step == 4
    found = uoe.evaluate(run, max_batches=2)
    assert found["loss"] == pytest.approx(summary["valid"]["loss"], abs=1e-5)
    whole = evaluate_model(run.model, run.config, max_batches=2)
    assert found["loss"] == whole["loss"]
    text = uoe.generate(str(tmp_path / "run"), "def ", max_new_tokens=8, seed=3)
    args = ["generate", str(tmp_path / "run"), "--prompt", "def ",
            "--max-new-tokens", "8", "--seed", "3"]  # fmt: skip
    capsys.readouterr()
    assert text.startswith("def ") and main(args) == 0
    assert capsys.readouterr().out == escape(text) + "\n"
    assert "mine, step 4" in repr(uoe.show(run))


def test_a_run_under_runs_is_found_by_its_name(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uoe.train(dataclasses.replace(tiny_config(), name="mine"), quiet=True)
    assert uoe.load_run("mine").folder.as_posix() == "runs/mine"
    with pytest.raises(ConfigError, match="no run at 'min'"):
        uoe.load_run("min")
    with pytest.raises(ConfigError, match="no preset 'tini'"):
        uoe.train("tini")


def test_a_dense_run_is_taken_apart_merged_and_adapted(tiny_config, tmp_path):
    config = tiny_config("tiny")
    uoe.train(config, tmp_path / "dense", quiet=True)
    found = uoe.decompose(tmp_path / "dense", tmp_path / "union", num_experts=4)
    assert found["exact"] and found["out"] == str(tmp_path / "union")
    back = uoe.merge(tmp_path / "union", tmp_path / "back")
    assert back["exact"]
    report = uoe.adapt(tmp_path / "dense", tmp_path / "fit", steps=2, quiet=True)
    assert report["steps"] == 2 and report["method"] == "tucker"
    with pytest.raises(ConfigError, match="no option 'topk'; did you mean top_k"):
        uoe.decompose(tmp_path / "dense", num_experts=4, topk=2)


def test_leakcheck_takes_presets_configs_and_models():
    config = uoe.get_preset("digits-vit-union")
    for subject in ("digits-vit-union", config, uoe.make_model(config)):
        assert all(finding.passed for finding in uoe.leakcheck(subject))


def test_plan_is_that_of_the_command(capsys):
    found = uoe.plan("tiny", "cpu:4", mesh={"tensor": 2})
    assert main(["plan", "tiny", "--topology", "cpu:4", "--mesh.tensor", "2"]) == 0
    printed = capsys.readouterr().out
    assert str(uoe.show(found)) == printed.rstrip("\n")
    assert found.fitting and all(p.sizes["tensor"] == 2 for p in found.fitting)
