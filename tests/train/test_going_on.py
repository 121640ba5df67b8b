"""What a run that goes on keeps, tells and refuses; what may fail beside it."""

import json
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.train.test_loop import assert_same_bits, lines_of, shared_programs
from tests.train.tiny_runs import with_train
from uoe_jax.data import prefetch
from uoe_jax.errors import CheckpointError, ConfigError, DataError
from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.train import loop, train
from uoe_jax.train.metrics import MetricsLog, read_metrics

shared_programs = shared_programs  # the fixture, for this module too


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    train(tiny(), run, quiet=True)
    return run


@pytest.fixture
def run(whole, tmp_path):
    """A copy of a finished run of 12 steps, saved at 8 and 12."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("env.json", ".lock")
    }


@pytest.mark.parametrize("what", ["all", "manifests"])
def test_lost_checkpoints_stop_the_run_and_nothing_goes(tiny, run, what):
    if what == "all":
        shutil.rmtree(run / "checkpoints")
    else:
        for file in (run / "checkpoints").glob("*/integrity.json"):
            file.unlink()
    before = content(run)
    with pytest.raises(
        CheckpointError, match="trained to step 12 .its best model"
    ) as e:
        train(tiny(), run, quiet=True)
    assert "\n" not in str(e.value) and e.value.exit_code == 2
    assert content(run) == before


def break_data(monkeypatch, at, error):
    """Let the training data fail at one step."""
    make_dataset = loop.make_dataset

    def broken(config, split):
        data = make_dataset(config, split)
        batch = data.batch

        def wrapped(step):
            if split == "train" and step == at:
                raise error
            return batch(step)

        data.batch = wrapped
        return data

    monkeypatch.setattr(loop, "make_dataset", broken)


def test_a_run_that_ended_before_its_second_save_starts_over(
    tiny, whole, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        break_data(patch, 3, KeyError("gone"))
        with pytest.raises(KeyError):
            train(tiny(), tmp_path, quiet=True)
    train(tiny(), tmp_path)
    assert "resuming from step 0" in capsys.readouterr().out
    assert_same_bits(tmp_path, whole)
    assert lines_of(tmp_path) == lines_of(whole)


def test_step_0_is_saved_first_and_goes_at_the_next_save(tiny, tmp_path, monkeypatch):
    seen = []
    write = MetricsLog.write

    def noted(self, line):
        seen.append(Checkpoints(tmp_path / "checkpoints").steps())
        write(self, line)

    monkeypatch.setattr(MetricsLog, "write", noted)
    train(tiny(steps=3), tmp_path, quiet=True)
    assert seen[0] == [0]
    assert Checkpoints(tmp_path / "checkpoints").steps() == [3]


def test_a_run_that_cannot_be_saved_ends_before_its_first_step(
    tiny, tmp_path, monkeypatch
):
    def full(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "_write", full)
    with pytest.raises(CheckpointError, match="saving step 0 .*nothing was trained"):
        train(tiny(), tmp_path, quiet=True)
    assert not list(read_metrics(tmp_path / "metrics.jsonl"))


def test_arrays_larger_than_the_disk_are_refused_before_a_byte(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    store = Checkpoints(tmp_path / "c")
    store.save(1, {"w": np.ones(5000, np.float32)}, {}, {})
    with pytest.raises(CheckpointError, match="No space left on device"):
        store.confirm()
    assert not any((tmp_path / "c").iterdir())


def test_a_local_folder_is_not_given_as_an_address(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    address = "file:///tmp/x"
    with pytest.raises(ConfigError, match="run_dir is file://.*give the local folder"):
        train(tiny(), Path(address), quiet=True)
    assert not list(tmp_path.iterdir())


def test_going_back_keeps_newer_steps_until_the_next_save(tiny, run, capsys):
    before = content(run)
    config = with_train(tiny(), steps=8)
    train(config, run, resume_step=8)
    assert "newer than step 8: step 12, the best model, of step 12" in (
        capsys.readouterr().out
    )
    after = content(run)
    assert {k: v for k, v in after.items() if k.name != "config.json"} == {
        k: v for k, v in before.items() if k.name != "config.json"
    }


def test_lines_that_hold_no_metrics_are_skipped_counted_and_kept(
    tiny, whole, run, capsys
):
    file = run / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    broken = [
        b"5\n",
        b"\n",
        b"\xff\xfe{\n",
        b'{"step": "x", "kind": "train"}\n',
        b"[]\n",
    ]
    broken += [b'{"kind": "train"}\n', b"{" * 100_000 + b"\n", b"null\n"]
    damaged = b"".join([*lines[:3], *broken, *lines[3:]]) + b'{"kind": "tr'
    file.write_bytes(damaged)
    shutil.rmtree(run / "checkpoints/12")
    train(tiny(), run, quiet=True)
    assert lines_of(run) == lines_of(whole)
    (warning,) = capsys.readouterr().err.splitlines()
    assert "8 lines of" in warning and "(4, 5, 6, 7, 8, ...)" in warning
    assert (run / "metrics.broken-1").read_bytes() == damaged
    assert str(run / "metrics.broken-1") in warning


class Sink:
    def __init__(self, error):
        self.error, self.lines = error, 0

    def log(self, values, step):
        self.lines += 1
        if step >= 7:
            raise self.error

    def finish(self):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(32, "Broken pipe"),
        ValueError("x"),
        SystemExit(0),
        StopIteration(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_sink_that_raises_is_switched_off(
    tiny, whole, tmp_path, monkeypatch, capsys, error
):
    sink = Sink(error)
    fake = type("wandb", (), {"init": staticmethod(lambda **_: sink)})
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(with_train(tiny(), wandb=True), tmp_path, quiet=True)
    assert lines_of(tmp_path) == lines_of(whole)
    (warning,) = capsys.readouterr().err.splitlines()
    assert f"train.wandb is off from here on: {type(error).__name__}" in warning
    assert sink.lines == 7 + 1  # the validation of step 5 too


def test_tensorboard_has_every_step_once_after_a_resume(tiny, tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    from uoe_jax.train.events import _records

    config = with_train(tiny(), tensorboard=True)
    train(config, tmp_path, quiet=True)
    shutil.rmtree(tmp_path / "checkpoints/12")
    train(config, tmp_path, quiet=True)
    steps = [
        event.step
        for path in (tmp_path / "tensorboard").iterdir()
        for _, text in _records(path.read_bytes())
        for event in [Event.FromString(text)]
        if any(value.tag == "train/loss" for value in event.summary.value)
    ]
    assert sorted(steps) == list(range(1, 13))


def test_a_thread_of_tensorboard_that_died_is_noticed(tiny, tmp_path, monkeypatch):
    from tensorboardX.event_file_writer import EventsWriter

    def full(self, text):
        raise OSError(28, "No space left on device")

    notes = []
    log = MetricsLog(tmp_path / "m", 0)
    log.add_sinks(with_train(tiny(), tensorboard=True), tmp_path, notes.append)
    monkeypatch.setattr(EventsWriter, "_write_serialized_event", full)
    monkeypatch.setattr(threading, "excepthook", lambda *args: None)
    for step in range(1, 2000):
        log.write({"kind": "train", "step": step, "loss": 1.0})
        if notes:
            break
    log.close()
    assert len(notes) == 1 and "train.tensorboard is off" in notes[0]


@pytest.mark.parametrize(
    "error", [StopIteration(), StopIteration("end"), SystemExit(0), GeneratorExit()]
)
def test_an_error_of_the_data_never_looks_like_its_end(error):
    def make(step):
        if step == 2:
            raise error
        return step

    got = []
    with pytest.raises(DataError, match=f"batch 2 .*{type(error).__name__}"):
        for batch in prefetch(make, 0, 5):
            got.append(batch)
    assert got == [0, 1]


def test_any_error_of_the_data_ends_a_run_by_its_name(tiny, tmp_path, monkeypatch):
    break_data(monkeypatch, 3, KeyError("gone"))
    with pytest.raises(KeyError, match="gone") as error:
        train(tiny(), tmp_path, quiet=True)
    assert error.value.__notes__ == ["while batch 3 was made"]


def test_more_steps_tell_of_the_jump_of_the_rate(tiny, run, capsys):
    train(with_train(tiny(), steps=24), run)
    out = capsys.readouterr().out
    rates = [line["lr"] for line in lines_of(run, "train")][11:13]
    assert rates[1] > 2 * rates[0]
    assert f"goes from {rates[0]:.3g} to {rates[1]:.3g} after step 12" in out
    assert "train.steps is 24, was 12" in out


def test_a_schedule_without_an_end_has_no_jump(tiny, tmp_path, capsys):
    config = tiny(optim={"schedule": "constant"})
    train(config, tmp_path, quiet=True)
    train(with_train(config, steps=13), tmp_path)
    assert "learning rate" not in capsys.readouterr().out


def test_another_mesh_is_told(tiny, run, capsys):
    import dataclasses

    from uoe_jax.config import MeshConfig

    config = dataclasses.replace(tiny(), mesh=MeshConfig(data=4, tensor=2))
    train(with_train(config, steps=13), run)
    assert "resharded from data 8 to data 4 x tensor 2" in capsys.readouterr().out
    manifest = json.loads((run / "checkpoints/13/integrity.json").read_text())
    assert manifest["mesh"] == {"data": 4, "tensor": 2}
