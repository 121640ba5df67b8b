"""Real processes, really killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.test_loop import assert_same_bits, lines_of

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from pathlib import Path
from tests.train.tiny_runs import make_tiny
from uoe_jax.errors import UoeError
from uoe_jax.train import train
config = make_tiny("union", cache_dir=sys.argv[1], steps=45, save_every=3, eval_every=7)
try:
    for run in sys.argv[2:]:
        train(config, Path(run))
except UoeError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def start(shared_folder, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }

    def start(*runs):
        command = [sys.executable, program, shared_folder / "prepared", *runs]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            list(map(str, command)), env=env, stdout=pipe, stderr=pipe, text=True
        )

    return start


def wait_for_lines(process, path, count):
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)  # asking more often takes the CPU it runs on


KILL, TERMINATE = signal.SIGKILL, signal.SIGTERM


@pytest.mark.parametrize(
    "signals",
    [
        # Late enough that something was saved. Signals that let it save: test_loop.py.
        pytest.param([(KILL, 10, 35)], id="once"),
        pytest.param(
            [(KILL, 1, 15), (KILL, 16, 30), (TERMINATE, 35, 35)],
            id="thrice",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_killed_runs_resume_to_the_bits_of_one_that_was_not(start, tmp_path, signals):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    seed = random.randrange(1000)
    print("seed", seed)
    rng = random.Random(seed)
    for number, first, last in signals:
        process = start(killed)
        wait_for_lines(process, killed / "metrics.jsonl", rng.randint(first, last))
        process.send_signal(number)
        _, stderr = process.communicate()
        assert process.returncode == (143 if number == TERMINATE else -number)
        if number == TERMINATE:
            assert stderr.startswith("stopped by SIGTERM after step ")
    process = start(killed, whole)
    out, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "resuming from step" in out
    assert [line["step"] for line in lines_of(killed, "train")] == list(range(1, 46))
    assert lines_of(killed) == lines_of(whole)
    assert_same_bits(killed, whole)
    assert_same_bits(killed, whole, folder="best")


SIGNALS = """
import importlib.util, signal, sys, time
# The module alone: its package would import jax.
spec = importlib.util.spec_from_file_location("signals", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
StopSignals = module.StopSignals
with StopSignals() as signals:
    print("ready", flush=True)
    while signals.received is None:
        time.sleep(0.01)
    print("noted", signals.received.name, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_the_process_at_once(number):
    process = subprocess.Popen(
        [sys.executable, "-c", SIGNALS, ROOT / "uoe_jax/train/signals.py"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == f"noted {number.name}\n"
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(30) == -number
    assert time.monotonic() - began < 20
    process.stdout.close()
