"""What a run says as it begins, and what is refused before anything heavy is loaded."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from uoe_jax.cli import main
from uoe_jax.errors import ConfigError
from uoe_jax.ops import dispatch, nvidia
from uoe_jax.train import train
from uoe_jax.train.clock import Rate
from uoe_jax.train.metrics import check_sinks

ROOT = Path(__file__).parents[2]
LLAMA = ROOT / "tests" / "goldens" / "hf" / "llama"


def test_a_run_says_what_it_is_before_it_trains(tiny_config, tmp_path, capsys):
    config = dataclasses.replace(tiny_config(), name="mine")
    train(config, tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mine: decoder, union attention, union MLP; ")
    assert lines[0].endswith("4 steps of 8 x 32 tokens")
    assert lines[1] == "devices: 8 x cpu (data 8)"
    assert lines[2].startswith("data: code.txt, ") and lines[2].endswith(" to train on")
    assert lines[3] == f"folder: {tmp_path / 'run'}"
    place = lines.index("compiling the training step ...")
    told = lines[place + 1]
    assert told.startswith("operations: ") and "segment_attention " in told
    assert lines[place + 2].startswith("compiled in ")
    env = json.loads((tmp_path / "run" / "env.json").read_text())
    assert env["operations"]["segment_attention"] in told
    assert "triton" not in env["packages"] or env["packages"]["triton"]


def test_quiet_says_nothing(tiny_config, tmp_path, capsys):
    train(tiny_config(), tmp_path / "run", quiet=True)
    assert not capsys.readouterr().out


def test_the_first_step_isnt_in_the_rate():
    rate = Rate(10)
    assert rate.add(5.0, 100) is None  # compiling what comes with it took so long
    assert rate.add(5.001, 200) is None
    assert abs(rate.add(6.001, 300) - 100) < 1e-6
    assert abs(rate.add(7.001, 400) - 100) < 1e-6


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")]
)
def test_what_should_follow_a_run_is_there_or_it_doesnt_begin(
    name, package, tiny_config, tmp_path, monkeypatch
):
    config = tiny_config()
    asked = dataclasses.replace(config.train, **{name: True})
    config = dataclasses.replace(config, train=asked)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(ConfigError, match=rf"{package} isn't installed.*\[{name}\]"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    check_sinks(config)


def test_a_gpu_without_the_kernels_package_is_told_of_once(monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    device = type("Device", (), {"compute_capability": "9.0"})
    monkeypatch.setattr("jax.devices", lambda: [device])
    fault = f"it needs jax-triton; {nvidia.INSTALL}"
    monkeypatch.setattr(nvidia, "installed_fault", lambda: fault)
    nvidia.warn_slow.cache_clear()
    with pytest.warns(UserWarning, match=r"more slowly.*uoe_jax\[kernels\]") as told:
        for _ in range(3):
            with pytest.raises(NotImplementedError):
                nvidia.require("bfloat16")
    assert len(told) == 1


def test_dispatch_notes_who_served(monkeypatch):
    monkeypatch.setattr(dispatch, "served", {})

    def cant():
        raise NotImplementedError("no such device")

    assert dispatch.dispatch("op", {"a": cant, "b": lambda: 3}, None) == 3
    assert dispatch.served == {"op": {"b": None}}


@pytest.mark.parametrize("case", [
    "other config", "no file", "empty prompt", "no tokenizer", "a hub's data",
    "another library's",
])  # fmt: skip
def test_refused_before_jax_is_loaded(case, union_run):
    args = {
        "other config": ["train", str(union_run), "--model.d-model", "64"],
        "no file": ["train", "tiny", "--data.path", "no-such-file.txt"],
        "empty prompt": ["generate", str(union_run), "--prompt", ""],
        "no tokenizer": ["train", "tiny", "--data.tokenizer", "gpt2"],
        "a hub's data": ["train", "tiny", "--data.path", "hf:wikitext"],
        "another library's": ["generate", str(LLAMA), "--prompt", "x"],
    }[case]
    code = (
        "import sys; from uoe_jax.cli import main; code = main(sys.argv[1:]);"
        "sys.exit('jax was loaded' if 'jax' in sys.modules else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    fix = {"no tokenizer": "hf:gpt2", "a hub's data": "tfds:NAME",
           "another library's": f"uoe import {LLAMA}"}  # fmt: skip
    assert fix.get(case, "uoe: ") in done.stderr


# Held in short by test_runs.py: runs side by side.
@pytest.mark.nightly
def test_a_page_of_several_runs_leaves_each_ones_own(union_run, tmp_path, capsys):
    import shutil

    for name in ("one", "two"):
        shutil.copytree(union_run, tmp_path / name)
    own = (tmp_path / "one" / "report.html").read_bytes()
    runs = [str(tmp_path / name) for name in ("one", "two")]
    assert main(["report", *runs, "--no-overlay"]) == 0
    page = tmp_path / "compare-one-two.html"
    assert capsys.readouterr().out == f"report: {page}\n"
    assert page.is_file() and (tmp_path / "compare-one-two" / "plots").is_dir()
    assert (tmp_path / "one" / "report.html").read_bytes() == own
