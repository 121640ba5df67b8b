"""A notebook's cell that trains: interrupted it has saved, run again it goes on."""

import os
import queue
import time
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel

from tests.train.test_loop import lines_of
from uoe_jax.runs.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]
SETUP = """
import jax
jax.config.update("jax_num_cpu_devices", 1)
from flax import nnx
nnx.set_graph_mode(False); nnx.set_graph_updates(False)
from pathlib import Path
from tests.train.tiny_runs import make_tiny
from uoe_jax.train import train
config = make_tiny(cache_dir={cache!r}, steps=400, save_every=1000, eval_every=1000)
"""
CELL = "found = train(config, Path({run!r}))\nprint('done', found['step'])"


@pytest.fixture
def kernel(shared_folder):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    manager, client = start_new_kernel(kernel_name="python3", env=env)
    try:
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def run_cell(client, code, seen=lambda text: None):
    """Run a cell to its end; return its printed text and its error's name and text."""
    asked = client.execute(code)
    said, error, end = "", None, time.monotonic() + 300
    while time.monotonic() < end:
        try:
            message = client.get_iopub_msg(timeout=1)
        except queue.Empty:
            continue
        if message["parent_header"].get("msg_id") != asked:
            continue
        content = message["content"]
        if message["msg_type"] in ("stream", "display_data"):
            # The library that shows notes knows notebooks and sends them as displays.
            said += content.get("text") or content["data"].get("text/plain", "")
            seen(said)
        elif message["msg_type"] == "error":
            error = (content["ename"], content["evalue"])
        elif message["msg_type"] == "status" and content["execution_state"] == "idle":
            return said, error
    raise AssertionError(f"the cell didn't end; it said: {said}")


# Held in short by test_loop.py: a signal saves, the same command resumes.
@pytest.mark.nightly
def test_an_interrupted_cell_has_saved_and_goes_on(kernel, shared_folder, tmp_path):
    manager, client = kernel
    run, interrupted = tmp_path / "run", []
    setup = SETUP.format(cache=str(shared_folder / "prepared"))
    assert run_cell(client, setup)[1] is None

    def interrupt(said):
        if "step 5/400" in said and not interrupted:
            interrupted.append(manager.interrupt_kernel())

    cell = CELL.format(run=str(run))
    said, error = run_cell(client, cell, interrupt)
    assert interrupted and error is not None, said
    name, text = error
    assert name == "StopRun" and text.startswith("stopped by SIGINT after step ")
    (saved,) = Checkpoints(run / "checkpoints").steps()
    assert 5 <= saved < 400 and f"after step {saved}, saved in {run}" in text
    said, error = run_cell(client, cell)
    assert error is None and f"resuming from step {saved}" in said
    assert said.rstrip().endswith("done 400")
    assert [line["step"] for line in lines_of(run, "train")] == list(range(1, 401))
