"""Two processes train into one folder of a store, each with a disk of its own."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.compare import assert_close
from tests.train.tiny_runs import make_tiny, with_train
from uoe_jax.config import MeshConfig, to_json
from uoe_jax.runs.stored import run_folder
from uoe_jax.train import train
from uoe_jax.train.metrics import read_metrics

WORKER = """
import os, sys
from pathlib import Path
os.environ["XDG_CACHE_HOME"] += "-" + os.environ["JAX_PROCESS_ID"]  # another machine
import jax
from flax import nnx
from tests.stores import bucket
from uoe_jax.config import from_json
from uoe_jax.train import train
from uoe_jax.train.peers import join

jax.config.update("jax_num_cpu_devices", 1)
nnx.set_graph_mode(False)
nnx.set_graph_updates(False)
join()
train(from_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
"""


def start(config, folder, address):
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    (folder / "config.json").write_text(to_json(config))
    for index in range(2):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
        command = [
            sys.executable,
            "-c",
            WORKER,
            str(folder / "config.json"),
            str(address),
        ]
        log = (folder / f"worker-{index}.log").open("ab")
        yield subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def test_two_processes_with_own_disks_save_one_checkpoint_in_a_store(store, tmp_path):
    config = make_tiny(cache_dir="bucket://b/data", steps=4, save_every=2)
    address = Path("bucket://b/runs/two")  # which makes one slash of two
    halves = with_mesh(config, MeshConfig(data=1, fsdp=2))
    workers = list(start(halves, tmp_path, address))
    try:
        codes = [worker.wait(timeout=600) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    said = [(tmp_path / f"worker-{index}.log").read_text() for index in range(2)]
    assert codes == [0, 0], said
    # One has prepared the data, the other one fetched it.
    assert ["fetching stdlib from bucket://b/data/" in text for text in said] == (
        [False, True]
    )
    saved = store / "b/runs/two/checkpoints/4"
    manifest = json.loads((saved / "integrity.json").read_text())
    there = {p.relative_to(saved).as_posix() for p in saved.rglob("*") if p.is_file()}
    assert there == {*manifest["files"], "integrity.json"}
    wide = [name for name in there if "mlp.w_up/" in name and "params" in name]
    assert len(wide) >= 3  # the halves of two processes, and the header
    assert (store / "b/runs/two/metrics-1.jsonl").is_file()
    # One process goes on with what two have saved, from a third machine.
    alone = train(config, tmp_path / "alone", quiet=True)
    more = with_train(config, steps=6)
    again = train(more, address, quiet=True)
    whole = train(more, tmp_path / "alone", quiet=True)
    assert alone["step"] == 4 and again["step"] == whole["step"] == 6
    lines = [
        {n["step"]: n["loss"] for n in read_metrics(file) if n["kind"] == "train"}
        for file in (
            run_folder(address, "it") / "metrics.jsonl",
            tmp_path / "alone" / "metrics.jsonl",
        )
    ]
    assert sorted(lines[0]) == sorted(lines[1]) == [1, 2, 3, 4, 5, 6]
    for step, loss in lines[0].items():
        assert_close(loss, lines[1][step], 1e-5)


def with_mesh(config, mesh):
    return dataclasses.replace(config, mesh=mesh)
