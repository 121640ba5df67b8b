"""`uoe adapt` in real processes, killed and stopped: the same command goes on."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from uoe_jax.model import flat_params, make_model
from uoe_jax.runs.write import Origin, write_run
from uoe_jax.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 40
PROGRAM = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
from uoe_jax.cli import main
run, *outs = sys.argv[1:]
for out in outs:
    status = main(["adapt", run, "--method", "lora", "--init", "hosvd", "--rank", "2",
                   "--targets", "*.wq", "--steps", "40", "--out", out,
                   "--mesh.data", "2", "--mesh.tensor", "2"])
    if status:
        sys.exit(status)
"""


@pytest.fixture(scope="module")
def base(tiny_config, tmp_path_factory):
    config, folder = tiny_config("tiny"), tmp_path_factory.mktemp("runs") / "base"
    model = make_model(config.model, jax.random.key(0))
    origin = Origin(made_by="test", source="nothing")
    write_run(folder, config, flat_params(model), origin)
    return folder


@pytest.fixture
def start(base, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

    def start(*outs):
        command = [sys.executable, program, base, *outs]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            list(map(str, command)), env=env, stdout=pipe, stderr=pipe, text=True
        )

    return start


def wait_for_lines(process, path, count):
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def results(folder):
    """Losses by step, and every number of the adapter."""
    lines = [
        (line["kind"], line["step"], line["loss"])
        for line in read_metrics(folder / "metrics.jsonl")
    ]
    return lines, load_file(folder / "adapter_model.safetensors")


def test_killed_and_stopped_adapters_go_on_to_the_same_bits(start, tmp_path):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    metrics = stopped / "metrics.jsonl"
    seed = random.randrange(1000)
    print("seed", seed)
    rng = random.Random(seed)
    process = start(stopped)
    wait_for_lines(process, metrics, rng.randrange(2, 12))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process = start(stopped)
    # The next line is written by this process: it trains.
    wait_for_lines(process, metrics, rng.randrange(14, 26))
    process.send_signal(signal.SIGTERM)  # others: test_signals.py
    _, said = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, said
    assert said.startswith("uoe: stopped by SIGTERM after step ")
    assert said.endswith("the same command continues\n") and said.count("\n") == 1
    assert not (stopped / "adapter_model.safetensors").exists()
    process = start(stopped, whole)
    out, said = process.communicate()
    assert process.returncode == 0, said
    assert "resuming from step" in out
    lines, arrays = results(stopped)
    want_lines, want = results(whole)
    assert [s for kind, s, _ in lines if kind == "train"] == [*range(1, STEPS + 1)]
    assert lines == want_lines
    assert arrays.keys() == want.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, want[name], err_msg=name)
