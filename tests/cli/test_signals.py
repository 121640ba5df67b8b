"""Commands that are interrupted, or whose output goes nowhere; real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

# A verb of its own, so that what it does when the signal comes is known.
PROGRAM = """
import gc, hashlib, sys, time, types
from pathlib import Path
from uoe_jax import cli
from uoe_jax.files import write_atomically

def work(args):
    if args == ["callback"]:  # Python drops what is raised in there
        def slow(phase, info):
            gc.callbacks.clear()
            print("ready", flush=True)
            time.sleep(30)
        gc.callbacks.append(slow)
        gc.collect()
        time.sleep(60)
    print("ready", flush=True)
    if args == ["write"]:
        Path.replace = lambda *a: (print("writing", flush=True), time.sleep(60))
        write_atomically(Path("file"), "new")
    if args == ["compiled"]:  # no way back to Python for minutes, as in XLA's compiler
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2_000_000_000)
    time.sleep(60)
    return 0

sys.modules["uoe_jax.work"] = types.SimpleNamespace(work=work)
cli.VERBS["work"] = cli.Verb("work:work", "")
sys.exit(cli.main(["work", *sys.argv[1:]]))
"""


def start(*args, program=PROGRAM, wait_for="ready\n", **options):
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", program, *args],
        stdout=pipe, stderr=pipe, text=True, env=ENV, **options,
    )  # fmt: skip
    line = ""
    while line != wait_for:
        line = process.stdout.readline()
        assert line, process.communicate()
    return process


@pytest.mark.parametrize("where", [(), ("callback",)], ids=["", "in a gc callback"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_verb_ends_in_one_line(number, where):
    process = start(*where)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    said = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    assert err == f"uoe: {said}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_nothing_half_written_stays(tmp_path, number):
    (tmp_path / "file").write_text("old")
    process = start("write", wait_for="writing\n", cwd=tmp_path)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_compiled_code_at_once(number):
    process = start("compiled")
    time.sleep(0.2)
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    began = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 5
    assert process.returncode == 128 + number
    assert err == "uoe: ended at once by the second signal\n"


def test_a_terminal_that_closes_sends_two_hangups_that_count_as_one():
    process = start("compiled")
    time.sleep(0.2)
    for _ in range(3):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.kill()
    process.communicate()


def train_command(text_file, run, *options):
    return [sys.executable, "-m", "uoe_jax", "train", "tiny", "--run-dir", str(run),
            "--data.path", str(text_file), "--data.cache-dir", str(text_file.parent),
            "--data.batch-size", "8", "--model.d-model", "16", "--model.d-ff", "32",
            "--model.num-layers", "1", "--model.num-heads", "2",
            "--model.num-kv-heads", "2", "--model.head-dim", "4",
            "--model.max-seq-len", "32", "--train.log-every", "1",
            "--train.eval-every", "1000", "--train.eval-batches", "2",
            "--train.save-every", "1000", "--no-report", *options]  # fmt: skip


def test_training_goes_on_when_nobody_reads_its_output(text_file, tmp_path):
    command = train_command(text_file, tmp_path / "run", "--train.steps", "20")
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, env=ENV)
    process.stdout.readline()
    process.stdout.close()  # as `head -1` does
    err = process.stderr.read().decode()
    assert process.wait(60) == 0
    assert err == (
        "warning: nobody reads the output any more; training continues without it\n"
    )
    assert Checkpoints(tmp_path / "run/checkpoints").steps() == [20]


def test_training_goes_on_when_its_output_has_no_room(text_file, tmp_path):
    command = train_command(text_file, tmp_path / "run", "--train.steps", "3")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=ENV
        )
    assert done.returncode == 0
    assert done.stderr.count("No space left on device") == 1
    assert Checkpoints(tmp_path / "run/checkpoints").steps() == [3]


def test_what_a_verb_cannot_print_is_a_failure():
    command = [sys.executable, "-m", "uoe_jax", "cost", "tiny"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=ENV
        )
    assert done.returncode == 1
    assert done.stderr == (
        "uoe: standard output can't be written (No space left on device)\n"
    )


def test_a_verb_whose_output_is_cut_short_by_head_is_none():
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "uoe_jax", "--help"]
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, env=ENV)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(30) == 0
    process.stderr.close()


def wait_for_lines(process, path, count):
    end = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("ignored", [False, True], ids=["terminal", "nohup"])
def test_a_hangup_saves_and_ends_unless_it_is_ignored(text_file, tmp_path, ignored):
    run = tmp_path / "run"
    command = train_command(text_file, run, "--train.steps", "400")
    if ignored:
        command = ["nohup", *command]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, env=ENV,
    )  # fmt: skip
    wait_for_lines(process, run / "metrics.jsonl", 3)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=120)
    saved = Checkpoints(run / "checkpoints").steps()[-1]
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl")]
    if ignored:
        assert process.returncode == 0 and saved == 400
    else:
        assert process.returncode == 129 and saved < 400
        assert f"stopped by SIGHUP after step {saved}, saved in {run}" in err
    assert max(steps) == saved
