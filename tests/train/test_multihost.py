"""Two processes train what one does, save and stop together, and notice a death."""

import dataclasses
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tests.compare import assert_close
from uoe_jax.config import MeshConfig, to_json
from uoe_jax.errors import CheckpointError, ConfigError
from uoe_jax.partition.mesh import mesh_for
from uoe_jax.runs.checkpoint import Checkpoints, snapshot
from uoe_jax.runs.state import layout_of
from uoe_jax.train import peers, train, watch
from uoe_jax.train.metrics import read_metrics
from uoe_jax.train.peers import join
from uoe_jax.train.signals import StopRun
from uoe_jax.train.watch import Watch

STEPS = 4
WORKER = """
import sys
from pathlib import Path
import jax
from flax import nnx
from uoe_jax.config import from_json
from uoe_jax.train import StopRun, train
from uoe_jax.train.peers import join

jax.config.update("jax_num_cpu_devices", 1)
nnx.set_graph_mode(False)
nnx.set_graph_updates(False)
join()
config, run_dir = from_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
try:
    train(config, run_dir, quiet=True)
except StopRun as stop:
    print(f"{stop} [{stop.exit_code}]", flush=True)
    train(config, run_dir, quiet=True)  # as the same command would
"""
STOPPED = re.compile(r"stopped by SIGTERM after step (\d+), saved in .* \[143\]")


def config_of(tiny, **train_options):
    options = {"steps": STEPS, "save_every": 2, "eval_every": 1000} | train_options
    config = tiny(**options)
    model = dataclasses.replace(config.model, num_layers=1)
    # Weights in two halves, so that each process saves what only it holds.
    return dataclasses.replace(config, model=model, mesh=MeshConfig(data=1, fsdp=2))


def start(config, folder, run_dir, count=2, code=WORKER):
    """Start some workers, joined over a free local port."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    file = folder / "config.json"
    file.write_text(to_json(config))
    workers = []
    for index in range(count):
        log = (folder / f"worker-{index}.log").open("wb")
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
        command = [sys.executable, "-c", code, str(file), str(run_dir)]
        workers.append(
            subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        )
    return workers


def wait_for(condition, workers, seconds=900):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        assert all(worker.poll() is None for worker in workers), "a worker ended"
        time.sleep(0.2)


def stops_of(folder):
    """The steps after which the workers say that they were stopped."""
    said = [(folder / f"worker-{index}.log").read_text() for index in range(2)]
    return [int(step) for text in said for step in STOPPED.findall(text)]


@pytest.fixture(scope="module")
def killed_run(tiny, tmp_path_factory):
    """A run of two processes: the second is told to stop, both go on, it is killed."""
    folder = tmp_path_factory.mktemp("together")
    config = config_of(tiny, steps=1_000_000, keep_checkpoints=1000)
    workers = start(config, folder, folder / "run")
    saved = lambda step: saved_at(folder / "run", step).exists()
    try:
        wait_for(lambda: saved(STEPS), workers)
        workers[1].send_signal(signal.SIGTERM)
        wait_for(lambda: len(stops_of(folder)) == 2, workers)
        wait_for(lambda: saved(max(stops_of(folder)) // 2 * 2 + 2), workers)
        workers[1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        workers[0].wait(timeout=120)
        return folder, workers, time.monotonic() - killed
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def saved_at(run_dir, step):
    return run_dir / "checkpoints" / str(step) / "integrity.json"


def lines_of(run_dir):
    lines = read_metrics(run_dir / "metrics.jsonl")
    return {line["step"]: line for line in lines if line["kind"] == "train"}


def test_the_other_process_ends_within_a_minute_and_names_the_killed_one(killed_run):
    folder, workers, seconds = killed_run
    assert workers[0].returncode not in (0, None)
    assert seconds < 60
    said = (folder / "worker-0.log").read_text()
    assert f"process 1 of 2 (process {workers[1].pid} on " in said


def test_a_signal_to_one_process_stops_both_after_the_same_step_saved(killed_run):
    folder, _, _ = killed_run
    first, second = stops_of(folder)
    assert first == second >= STEPS and saved_at(folder / "run", first).exists()
    # They went on from there: no step is missing, none was taken twice.
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > first


def test_training_and_what_is_saved_are_those_of_one_process(
    killed_run, tiny, tmp_path
):
    folder = killed_run[0]
    config = config_of(tiny)
    train(config, tmp_path / "alone", quiet=True)
    together, alone = lines_of(folder / "run"), lines_of(tmp_path / "alone")
    for step in range(1, STEPS + 1):
        # No example is skipped or repeated: each step has the same tokens and loss.
        assert together[step]["tokens"] == alone[step]["tokens"]
        assert_close(together[step]["loss"], alone[step]["loss"], 1e-5)
    stores = [
        Checkpoints(path / "checkpoints")
        for path in (folder / "run", tmp_path / "alone")
    ]
    states = [restore_all(store, STEPS) for store in stores]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert_close(value, states[1][name], 1e-5, least=1.0, about=name)


def restore_all(store, step):
    manifest = json.loads((store.folder / str(step) / "integrity.json").read_text())
    shapes = {
        name: np.empty(about["shape"], about["dtype"])
        for name, about in manifest["arrays"].items()
    }
    return store.restore(shapes, step=step)[1]


def test_what_two_processes_saved_moves_from_mesh_to_mesh(killed_run, tiny, tmp_path):
    """2 processes -> 8 -> 4 -> 2 devices, saved and restored each time, bit by bit."""
    store = Checkpoints(killed_run[0] / "run" / "checkpoints")
    saved = restore_all(store, STEPS)
    meshes = [
        MeshConfig(data=2, fsdp=4),
        MeshConfig(data=1, fsdp=2, tensor=2),
        MeshConfig(data=1, tensor=2),
    ]
    for number, mesh in enumerate(meshes):
        config = dataclasses.replace(config_of(tiny), mesh=mesh)
        layout = layout_of(config, mesh_for(config))
        state = layout.place(layout.to_memory(restore_all(store, STEPS)))
        weight = state["params.trunk.blocks.0.mlp.w_up"]
        assert weight.addressable_shards[0].data.size < weight.size
        store = Checkpoints(tmp_path / str(number))
        store.save(STEPS, layout.to_file(snapshot(state)), {}, {})
        store.close()
        moved = restore_all(store, STEPS)
        for name, value in saved.items():
            assert np.array_equal(value, moved[name]), name


def test_no_cluster_says_what_to_set(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="set JAX_COORDINATOR_ADDRESS"):
        join()


class Meeting:
    """Three watches of this process, joined, with what each would say as it ends."""

    def __init__(self):
        address, known = queue.Queue(), threading.Event()

        def share(text):
            if text:
                address.put(text)
                known.set()
            assert known.wait(20)
            return address.queue[0]

        self.said = queue.Queue()
        self.watches = [
            Watch(i, 3, share, lambda text, code, i=i: self.said.put((i, text, code)))
            for i in range(3)
        ]
        for member in self.watches:
            member.__enter__()

    def leave(self, index, error=None):
        self.watches[index].__exit__(type(error) if error else None, error, None)

    def hear(self, count):
        return sorted(self.said.get(timeout=20) for _ in range(count))


@pytest.mark.parametrize("victim", [0, 2])
def test_a_connection_that_closes_without_a_word_is_named_by_all_others(victim):
    meeting = Meeting()
    # All that the kernel does for a process that was killed: it closes its connections.
    meeting.watches[victim]._tell = lambda *_: None
    meeting.leave(victim)
    said = meeting.hear(2)
    assert {index for index, _, _ in said} == {0, 1, 2} - {victim}
    for _, text, code in said:
        assert f"process {victim} of 3 (process {os.getpid()} on " in text
        assert "is gone; the last checkpoint is intact" in text and code == 1


@pytest.mark.parametrize("victim", [0, 2])
def test_a_process_that_stands_still_is_named_by_the_others(victim, monkeypatch):
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(watch, "SILENT_SECONDS", 1.5)
    meeting = Meeting()
    # As of a stopped process: its connections stay open, whatever it is told.
    meeting.watches[victim]._beat = lambda now: False
    meeting.watches[victim]._tell = lambda *_: None
    meeting.watches[victim]._finish = lambda *_: None
    said = meeting.hear(2)
    assert {index for index, _, _ in said} == {0, 1, 2} - {victim}
    for _, text, code in said:
        assert text.startswith(f"process {victim} of 3 (process {os.getpid()} on ")
        assert "has given no sign of life for 2 s: it is stopped" in text and code == 1
    meeting.leave(victim)


def test_who_stood_still_himself_blames_nobody(monkeypatch):
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(watch, "SILENT_SECONDS", 1.0)
    clock, ahead = time.monotonic, [0.0]
    meeting = Meeting()
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock() + ahead[0])
    ahead[0] = 100.0  # all of them, as one process with one clock
    time.sleep(0.5)
    assert meeting.said.empty()
    for index in (2, 1, 0):
        meeting.leave(index)


def test_who_stood_still_says_of_nobody_that_he_is_behind(monkeypatch, capfd):
    """What the others said meanwhile is read only after that."""
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.1)
    clock, ahead = time.monotonic, [0.0]
    meeting = Meeting()
    first = meeting.watches[0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock() + ahead[0])
    for index, member in enumerate(meeting.watches):
        member.at(3 if index == 2 else 5)
    end = clock() + 20
    while not first._behind and clock() < end:
        time.sleep(0.05)
    assert first._behind
    ahead[0] = 100.0
    while first._beaten < end and clock() < end:  # the jump is longer than the wait
        time.sleep(0.05)
    time.sleep(0.3)
    assert first._beaten > end and "behind" not in capfd.readouterr().err
    for index in (2, 1, 0):
        meeting.leave(index)


@pytest.mark.parametrize("victim", [0, 2])
def test_who_hangs_before_a_step_of_the_others_is_named(victim, monkeypatch, capfd):
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(watch, "BEHIND_SECONDS", 0.5)
    meeting = Meeting()
    for index, member in enumerate(meeting.watches):
        member.at(3 if index == victim else 5)
    name, told = f"process {victim} of 3 (process {os.getpid()} on ", ""
    end = time.monotonic() + 30
    while "holds the others up" not in told and time.monotonic() < end:
        time.sleep(0.1)  # where this test is, the process's main thread
        told += capfd.readouterr().err
    first, second = told.strip().splitlines()[:2]
    assert first.startswith(f"uoe: {name}")
    assert "has been behind at step 3 for " in first
    assert first.endswith("s; others have begun step 5 and wait for it")
    assert second.startswith(f"uoe: {name}")
    assert "test_who_hangs_before_a_step_of_the_others_is_named" in second
    time.sleep(1)
    assert capfd.readouterr().err == ""  # said once a step
    assert meeting.said.empty()  # slow isn't gone: nobody ends
    for index in (2, 1, 0):
        meeting.leave(index)


def test_no_default_lets_a_stopped_process_go_unsaid_for_a_minute():
    """And what jax says itself, after half of its time at the earliest, comes later."""
    slowest = watch.SILENT_SECONDS + 2 * watch.BEAT_SECONDS + watch.GRACE_SECONDS
    assert slowest < peers._HEARTBEAT_SECONDS / 2 <= 60


def test_who_leaves_without_an_error_is_not_missed():
    meeting = Meeting()
    meeting.leave(1)
    meeting.leave(2, StopRun("stopped by SIGTERM", 143))
    meeting.leave(0)
    assert not any(w._thread.is_alive() for w in meeting.watches)
    assert meeting.said.empty()


def test_an_error_of_one_process_is_what_the_others_say_as_they_end(monkeypatch):
    monkeypatch.setattr(watch, "GRACE_SECONDS", 0.3)
    meeting = Meeting()
    meeting.leave(1, CheckpointError("no room"))
    said = meeting.hear(3)
    assert "process 1 of 3" in said[0][1] and "failed: no room" in said[0][1]
    assert said[2][1] == said[0][1]
    # It has said so itself; it only stops waiting for the others, with its own code.
    assert said[1] == (1, "", CheckpointError.exit_code)
