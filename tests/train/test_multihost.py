"""Two processes train what one does, save together, and notice when one is killed."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from uoe_jax.checkpoint import Checkpoints, snapshot
from uoe_jax.config import MeshConfig, to_json
from uoe_jax.errors import ConfigError
from uoe_jax.partition.mesh import mesh_for
from uoe_jax.train import train
from uoe_jax.train.metrics import read_metrics
from uoe_jax.train.peers import Watch, join
from uoe_jax.train.state import layout_of

STEPS = 4
WORKER = """
import sys
from pathlib import Path
import jax
from flax import nnx
from uoe_jax.config import from_json
from uoe_jax.partition.mesh import mesh_for
from uoe_jax.train import train
from uoe_jax.train.peers import join

jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_disable_most_optimizations", True)
nnx.set_graph_mode(False)
nnx.set_graph_updates(False)
join()
train(from_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), quiet=True)
"""


def config_of(tiny, **train_options):
    options = {"steps": STEPS, "save_every": 2, "eval_every": 1000} | train_options
    config = tiny(**options)
    model = dataclasses.replace(config.model, num_layers=1)
    # Weights in two halves, so that each process saves what only it holds.
    return dataclasses.replace(config, model=model, mesh=MeshConfig(data=1, fsdp=2))


def start(config, folder, run_dir, count=2):
    """Start one worker process each, joined over a free local port."""
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
        command = [sys.executable, "-c", WORKER, str(file), str(run_dir)]
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


@pytest.fixture(scope="module")
def killed_run(tiny, tmp_path_factory):
    """A run of two processes that goes on until the second is killed after a save."""
    folder = tmp_path_factory.mktemp("together")
    config = config_of(tiny, steps=1_000_000, keep_checkpoints=1000)
    workers = start(config, folder, folder / "run")
    saved = folder / "run" / "checkpoints" / str(STEPS) / "integrity.json"
    try:
        wait_for(saved.exists, workers)
        workers[1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        workers[0].wait(timeout=120)
        return folder, workers, time.monotonic() - killed
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def lines_of(run_dir):
    lines = read_metrics(run_dir / "metrics.jsonl")
    return {line["step"]: line for line in lines if line["kind"] == "train"}


def test_the_other_process_ends_within_a_minute_and_names_the_killed_one(killed_run):
    folder, workers, seconds = killed_run
    assert workers[0].returncode not in (0, None)
    assert seconds < 60
    said = (folder / "worker-0.log").read_text()
    assert f"process 1 of 2 (process {workers[1].pid} on " in said


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
        np.testing.assert_allclose(
            together[step]["loss"], alone[step]["loss"], rtol=1e-6
        )
    stores = [
        Checkpoints(path / "checkpoints")
        for path in (folder / "run", tmp_path / "alone")
    ]
    states = [restore_all(store, STEPS) for store in stores]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        np.testing.assert_allclose(value, states[1][name], atol=1e-6, err_msg=name)


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


def test_a_watch_names_who_fell_silent(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 3)
    watch = Watch(tmp_path, end=lambda text: None, lost_seconds=10.0)
    watch._folder.mkdir()
    (watch._folder / "1").write_text("1 process 7 on here")
    (watch._folder / "2").write_text("1 process 8 on there")
    assert watch.missing(0.0) is None
    (watch._folder / "1").write_text("2 process 7 on here")
    assert watch.missing(9.0) is None
    found = watch.missing(11.0)
    assert found is not None and "process 2 of 3 (process 8 on there) is gone" in found
    (watch._folder / "2").write_bytes(b"done")
    (watch._folder / "1").write_text("3 process 7 on here")
    assert watch.missing(30.0) is None
