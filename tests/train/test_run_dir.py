import dataclasses
import json
import os
import socket
import subprocess
import sys

import pytest

from tests.train.tiny_runs import make_tiny, with_train
from uoe_jax.errors import ConfigError
from uoe_jax.runs.folder import open_run_dir, write_environment

CONFIG = make_tiny()


def start(path, config=CONFIG, **kwargs):
    """Open a run once, with a metrics file as of a run that trained."""
    with open_run_dir(path, config, **kwargs):
        (path / "metrics.jsonl").touch()


def test_the_same_config_reopens_and_budgets_may_change(tmp_path):
    start(tmp_path)
    start(tmp_path, with_train(CONFIG, steps=99, max_seconds=5.0, log_every=1))
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 99


def test_another_config_is_refused_with_both_values(tmp_path):
    start(tmp_path)
    model = dataclasses.replace(CONFIG.model, d_model=64)
    optim = dataclasses.replace(CONFIG.optim, beta1=0.5)
    other = dataclasses.replace(CONFIG, model=model, optim=optim)
    with pytest.raises(ConfigError) as error:
        start(tmp_path, other)
    assert "model.d_model is 64, was 16" in str(error.value)
    assert "optim.beta1 is 0.5, was 0.9" in str(error.value)
    assert "\n" not in str(error.value)


def test_without_resume_a_run_is_not_overwritten(tmp_path):
    start(tmp_path, resume=False)
    with pytest.raises(ConfigError, match="has a run already"):
        start(tmp_path, resume=False)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"name": "\xff"}', b"{"])
def test_a_damaged_config_is_refused_by_its_path(tmp_path, content):
    start(tmp_path)
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        start(tmp_path)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert file.read_bytes() == content


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below"):
        with pytest.raises(ConfigError, match=r"can't be written \(.*\); choose"):
            start(path)


def test_a_second_run_in_the_folder_is_refused_by_name(tmp_path):
    with open_run_dir(tmp_path, CONFIG):
        message = f"process {os.getpid()} on {socket.gethostname()} is training"
        for _ in range(2):
            with pytest.raises(ConfigError, match=message):
                start(tmp_path)
    start(tmp_path)


def test_the_lock_of_a_dead_process_is_recovered(tmp_path):
    code = f"""
import fcntl, json, os, signal, socket
fd = os.open({str(tmp_path / ".lock")!r}, os.O_RDWR | os.O_CREAT)
fcntl.flock(fd, fcntl.LOCK_EX)
os.write(fd, json.dumps({{"pid": os.getpid(), "host": socket.gethostname()}}).encode())
print(os.getpid(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    notes = []
    start(tmp_path, note=notes.append)
    (note,) = notes
    assert note.startswith(f"recovered the lock of process {out.stdout.strip()}")
    start(tmp_path, note=notes.append)
    assert len(notes) == 1


def test_another_hosts_lock_is_left_to_a_person(tmp_path):
    (tmp_path / ".lock").write_text(json.dumps({"pid": 7, "host": "elsewhere"}))
    with pytest.raises(ConfigError, match=r"process 7 on elsewhere .* delete"):
        start(tmp_path)
    (tmp_path / ".lock").unlink()
    start(tmp_path)


def test_an_error_inside_frees_the_lock(tmp_path):
    with pytest.raises(RuntimeError), open_run_dir(tmp_path, CONFIG):
        raise RuntimeError
    start(tmp_path)


def test_environment_names_versions_devices_and_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    write_environment(tmp_path, {"mesh": {"data": 8}})
    content = json.loads((tmp_path / "env.json").read_text())
    assert content["git_commit"] == head and content["git_changed"] is False
    assert content["devices"] == {"kind": "cpu", "visible": 8}
    assert content["packages"]["jax"] and content["mesh"] == {"data": 8}
