"""Runs that nobody trained: written whole or not at all; changes of a run."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from tests.train.tiny_runs import make_tiny
from uoe_jax.data.record import read_record, record_of_tokenizer
from uoe_jax.errors import CheckpointError, ConfigError
from uoe_jax.model import flat_params, make_model
from uoe_jax.runs import checkpoint, write
from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.runs.folder import has_begun
from uoe_jax.runs.load import load_run
from uoe_jax.runs.lock import RunLock
from uoe_jax.runs.result import read_result
from uoe_jax.runs.state import Progress
from uoe_jax.runs.write import Origin, write_run
from uoe_jax.surgery import Changed, Form, operate

SPENT = Progress(seconds=5.0, tokens=700, flops=9e9, best_loss=1.0, best_step=3)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_tiny("union", cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def params(config):
    return flat_params(make_model(config.model, jax.random.key(0)))


@pytest.fixture(scope="module")
def source(config, params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "source"
    origin = Origin(made_by="import", source="a file", step=7, spent=SPENT)
    write_run(folder, config, params, origin)
    return folder


def origin(**changes):
    return Origin(made_by="import", source="a file", **changes)


def test_a_written_run_is_what_was_given(source, config, params):
    run = load_run(source)
    assert run.step == 7
    assert run.progress == dataclasses.replace(SPENT, first_step=7)
    assert run.config.model == config.model
    chex.assert_trees_all_equal(flat_params(run.model), params)
    made = json.loads((source / "env.json").read_text())["made_from"]
    assert made == {"by": "import", "source": "a file"}
    assert not has_begun(source)  # so that its first training may change fields
    assert [p.name for p in source.parent.iterdir()] == ["source"]


def test_a_model_without_data_keeps_its_tokenizer(config, params, tmp_path):
    write_run(tmp_path / "a", config, params, origin(data=record_of_tokenizer(None)))
    assert read_record(tmp_path / "a").tokenizer().name == "byte"


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_parameters_of_another_model_are_refused_by_name(
    change, config, params, tmp_path
):
    name = "trunk.blocks.0.attention.wq"
    wrong = dict(params)
    array = wrong.pop(name)
    if change == "unknown":
        wrong[name + "q"] = array
        wrong[name] = array
    if change == "shape":
        wrong[name] = array[:1]
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")) as found:
        write_run(tmp_path / "a", config, wrong, origin())
    assert "\n" not in str(found.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(config, params, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ConfigError, match="isn't empty"):
        write_run(tmp_path, config, params, origin())
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


def test_no_room_leaves_nothing(config, params, tmp_path, monkeypatch):
    def full(folder, arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_check_room", full)
    with pytest.raises(CheckpointError, match="No space left") as found:
        write_run(tmp_path / "a", config, params, origin())
    assert str(tmp_path / "a") in str(found.value)
    assert "unfinished" not in str(found.value)
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
import jax
from uoe_jax.config import ExperimentConfig, from_json
from uoe_jax.model import flat_params, make_model
from uoe_jax.runs import write
config = from_json(Path(sys.argv[2]).read_text(), ExperimentConfig)
write.Checkpoints.close = lambda self: os.kill(os.getpid(), signal.SIGKILL)
params = flat_params(make_model(config.model, jax.random.key(0)))
arrays = {"a.npy": params["embed.embedding"]}
origin = write.Origin(made_by="import", source="x", arrays=arrays)
write.write_run(Path(sys.argv[1]), config, params, origin)
"""


def test_a_killed_writer_leaves_no_run_and_the_next_one_cleans_up(
    source, config, params, tmp_path
):
    out = tmp_path / "a"
    command = [sys.executable, "-c", KILLED, str(out), str(source / "config.json")]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": root})
    assert done.returncode == -signal.SIGKILL
    assert not out.exists() and (tmp_path / ".a.unfinished" / "a.npy").is_file()
    write_run(out, config, params, origin())
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert not (out / "a.npy").exists()  # of the writer that was killed
    assert Checkpoints(out / "checkpoints").steps() == [0]


def test_a_signal_before_the_folder_is_locked_leaves_nothing(
    config, params, tmp_path, monkeypatch
):
    def interrupted(folder, note):
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "RunLock", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_run(tmp_path / "a", config, params, origin())
    assert not list(tmp_path.iterdir())


def test_a_signal_while_a_save_is_waited_for_ends_with_the_save(
    config, params, tmp_path, monkeypatch
):
    wait, save = Checkpoints.wait, Checkpoints._write

    def interrupted(self):
        if self._pending is not None:
            self._pending = None
            raise KeyboardInterrupt
        wait(self)

    def slow(self, *content):
        time.sleep(0.5)
        save(self, *content)

    monkeypatch.setattr(Checkpoints, "wait", interrupted)
    monkeypatch.setattr(Checkpoints, "_write", slow)
    with pytest.raises(KeyboardInterrupt):
        write_run(tmp_path / "a", config, params, origin())
    time.sleep(1.0)  # whoever still writes has written
    assert not list(tmp_path.iterdir())


def test_a_folder_that_another_writes_is_left_alone(config, params, tmp_path):
    unfinished = tmp_path / ".a.unfinished"
    unfinished.mkdir()
    lock = RunLock(unfinished, print)
    lock.acquire()
    try:
        (unfinished / "theirs").write_text("kept")
        with pytest.raises(ConfigError, match="choose another --out"):
            write_run(tmp_path / "a", config, params, origin())
        assert (unfinished / "theirs").read_text() == "kept"
    finally:
        lock.release()


def scaled(factor, did="scale"):
    """Return a change that scales the last layer's output weights."""

    def change(config, params, source):
        name = next(n for n in params if n.endswith("mlp.w_down"))
        new = params | {name: params[name] * np.float32(factor)}
        form = Form(config.model, new, source.buffers)
        named = dataclasses.replace(config, name="scaled")
        return Changed(
            did=did,
            config=named,
            params=new,
            buffers=source.buffers,
            report={"factor": factor},
            forms={"scaled": form},
        )

    return change


def test_a_change_is_compared_with_its_source_and_written(source, tmp_path):
    found = operate(source, tmp_path / "same", scaled(1.0), verb="scale")
    assert found["exact"] and found["max_logit_difference"] == 0
    assert found["loss_source"] == found["loss_scaled"]
    assert read_result(tmp_path / "same") == found
    assert (found["did"], found["run"], found["step"]) == ("scale", str(source), 7)
    found = operate(source, tmp_path / "other", scaled(2.0), verb="scale")
    assert not found["exact"] and found["max_logit_difference"] > 1e-3
    assert found["loss_source"] != found["loss_scaled"]


def test_what_the_source_spent_is_kept_through_any_number_of_changes(source, tmp_path):
    operate(source, tmp_path / "one", scaled(2.0), verb="scale")
    operate(tmp_path / "one", tmp_path / "two", scaled(0.5), verb="scale")
    run = load_run(tmp_path / "two")
    assert run.progress == Progress(seconds=5.0, tokens=700, flops=9e9, first_step=7)
    first = flat_params(load_run(source).model)
    chex.assert_trees_all_equal(flat_params(run.model), first)


def test_a_change_that_fails_leaves_nothing(source, tmp_path):
    def change(config, params, source):
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        operate(source, tmp_path / "a", change, verb="scale")
    wrong = lambda config, params, source: Changed(did="x", config=config, params={})
    with pytest.raises(ConfigError, match="absent"):
        operate(source, tmp_path / "a", wrong, verb="scale")
    assert not list(tmp_path.iterdir())


def test_a_signal_while_it_is_saved_leaves_nothing(
    config, params, tmp_path, monkeypatch
):
    """The save goes on in a thread of its own, into a folder that is to go."""
    saves = []
    save = Checkpoints.save

    def interrupted(self, *what):
        save(self, *what)
        saves.append(self._pending)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_run(tmp_path / "a", config, params, origin())
    (pending,) = saves
    assert pending is None or pending.done()
    assert not [*tmp_path.iterdir()]


def test_a_folder_whose_name_is_no_utf_8_is_refused(config, params, tmp_path):
    name = os.fsdecode(b"caf\xe9")
    with pytest.raises(CheckpointError, match="aren't UTF-8.*rename it"):
        write_run(tmp_path / name, config, params, origin())
    assert not [*tmp_path.iterdir()]
    Checkpoints(tmp_path / "café").close()
