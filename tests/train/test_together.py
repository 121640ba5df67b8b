"""Two real processes of `uoe train --distributed`: as one, and one of them stopped."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from uoe_jax.cli import main
from uoe_jax.train.watch import SILENT_SECONDS

TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(400))


def command(folder, run, steps):
    """Return the command that both processes run; its words are one process's, too."""
    return [
        sys.executable, "-m", "uoe_jax", "train", "tiny-union", "--no-report",
        "--run-dir", str(folder / run), "--data.path", str(folder / "text.txt"),
        "--data.cache-dir", str(folder), "--data.batch-size", "4",
        "--model.d-model", "16", "--model.d-ff", "32", "--model.num-layers", "1",
        "--model.head-dim", "4", "--model.max-seq-len", "32", "--train.log-every", "1",
        "--train.steps", str(steps), "--train.save-every", "2",
        "--train.eval-every", "1000", "--train.eval-batches", "1",
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def start(folder, run, steps):
    """Start the command twice, joined over a free local port."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    workers = []
    for index in range(2):
        who = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
        args = [*command(folder, run, steps), "--distributed"]
        log = (folder / f"{run}-{index}.log").open("wb")
        workers.append(
            subprocess.Popen(args, env=os.environ | who, stdout=log, stderr=log)
        )
    return workers


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def test_two_processes_train_as_one(folder):
    workers = start(folder, "two", 4)
    try:
        for index, worker in enumerate(workers):
            said = folder / f"two-{index}.log"
            assert worker.wait(timeout=900) == 0, said.read_text()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    about = json.loads((folder / "two" / "env.json").read_text())
    assert about["processes"] == 2 and about["mesh"] == {"data": 2}
    assert "step 4" in (folder / "two-0.log").read_text()
    assert "loss" not in (folder / "two-1.log").read_text()  # one of them speaks
    assert main([*command(folder, "one", 4)[3:], "--mesh.data", "1", "--quiet"]) == 0
    one, two = losses(folder / "one"), losses(folder / "two")
    assert one.keys() == two.keys() == {1, 2, 3, 4}
    assert all(abs(one[step] - two[step]) < 1e-4 for step in one)


# Held in short by test_multihost.py: a process that stands still.
@pytest.mark.nightly
def test_a_process_that_is_stopped_is_named_by_the_other(folder):
    workers = start(folder, "run", 1_000_000)
    try:
        end = time.monotonic() + 900
        while not (folder / "run" / "checkpoints" / "2" / "integrity.json").exists():
            assert time.monotonic() < end
            assert all(worker.poll() is None for worker in workers)
            time.sleep(0.2)
        workers[1].send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        assert workers[0].wait(timeout=300) == 1
        took = time.monotonic() - stopped
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    # Before the runtime's own abort, which says nothing of who it was.
    assert SILENT_SECONDS / 2 < took < 60
    said = (folder / "run-0.log").read_text()
    who = f"process 1 of 2 (process {workers[1].pid} on "
    found = re.search(re.escape(who) + r"[^\n]*no sign of life for 40 s: it is", said)
    assert found and "Traceback" not in said, said[-2000:]
    assert "is intact" in said
