"""Whose a run's folder is: holders that live, died, moved or can't be asked."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.train.tiny_runs import make_tiny
from uoe_jax.runs import lock as lock_module
from uoe_jax.runs.folder import open_run_dir
from uoe_jax.runs.lock import FolderLost, Locked, RunLock

CONFIG = make_tiny()


@pytest.fixture
def quick(monkeypatch):
    """Signs of life every 0.05 s; a holder is gone after one second without."""
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock_module, "GONE_SECONDS", 1.0)


@pytest.fixture
def no_flock(monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


def content(path):
    return json.loads((path / ".lock").read_text())


def leave(path, age=0.0, **changes):
    """Leave a lock as of a holder that didn't end cleanly."""
    with open_run_dir(path, CONFIG):
        owner = content(path)
    file = path / ".lock"
    file.write_text(json.dumps(owner | {"pid": 7} | changes))
    os.utime(file, (time.time() - age,) * 2)
    return file


def test_a_living_holder_is_refused_where_there_are_no_locks(tmp_path, no_flock):
    with open_run_dir(tmp_path, CONFIG):
        with pytest.raises(Locked, match=f"process {os.getpid()} on .* is training"):
            RunLock(tmp_path, print).acquire()
        assert content(tmp_path)["pid"] == os.getpid()
    with open_run_dir(tmp_path, CONFIG):
        pass


def test_a_dead_holder_is_recovered_where_there_are_no_locks(tmp_path, no_flock):
    done = subprocess.Popen([sys.executable, "-c", "pass"])
    done.wait()
    leave(tmp_path, pid=done.pid)
    notes = []
    with open_run_dir(tmp_path, CONFIG, note=notes.append):
        assert content(tmp_path)["pid"] == os.getpid()
    assert notes == [f"recovered the lock of process {done.pid} on "
                     f"{os.uname().nodename}, which is gone"]  # fmt: skip


def test_a_process_number_used_again_is_not_the_holder(tmp_path, no_flock):
    # This very process has the number, but began at another time.
    leave(tmp_path, pid=os.getpid(), started="1")
    with open_run_dir(tmp_path, CONFIG):
        pass


def test_a_silent_holder_elsewhere_is_taken_over(tmp_path, quick):
    leave(tmp_path, host="elsewhere", age=2.0)
    notes = []
    with open_run_dir(tmp_path, CONFIG, note=notes.append):
        pass
    assert notes == ["recovered the lock of process 7 on elsewhere, which is gone"]


def test_a_holder_elsewhere_that_just_fell_silent_is_waited_for(tmp_path, quick):
    leave(tmp_path, host="elsewhere")
    notes, began = [], time.monotonic()
    with open_run_dir(tmp_path, CONFIG, note=notes.append):
        pass
    assert time.monotonic() - began > 0.5
    assert "waiting 1 s for a sign of life" in notes[0] and len(notes) == 2


def test_a_holder_elsewhere_that_beats_is_refused(tmp_path, quick):
    file = leave(tmp_path, host="elsewhere")
    owner = json.loads(file.read_text())

    def beat():
        time.sleep(0.2)
        file.write_text(json.dumps(owner | {"beat": 9}))

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(Locked, match="process 7 on elsewhere is training"):
        RunLock(tmp_path, print).acquire()
    thread.join()
    assert json.loads(file.read_text())["pid"] == 7


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_holder_gives_signs_of_life(tmp_path, quick):
    with open_run_dir(tmp_path, CONFIG):
        wait_until(lambda: content(tmp_path)["beat"] > 1)


def test_a_renamed_folder_is_noticed(tmp_path, quick):
    run, moved = tmp_path / "run", tmp_path / "moved"
    with open_run_dir(run, CONFIG) as held:
        held.look()
        held.check()
        run.rename(moved)
        wait_until(lambda: held._lost)
        with pytest.raises(FolderLost, match="run was renamed, deleted or replaced"):
            held.check()
    assert not run.exists()
    with open_run_dir(moved, CONFIG):
        pass


def test_a_folder_that_its_holder_moves_stays_held(tmp_path, quick):
    run, moved = tmp_path / "run", tmp_path / "moved"
    run.mkdir()
    held = RunLock(run, print)
    held.acquire()
    held.move(moved)
    held.look()
    held.check()
    before = content(moved)["beat"]
    wait_until(lambda: content(moved)["beat"] > before + 1)
    with pytest.raises(Locked, match="is training in .*moved"):
        RunLock(moved, print).acquire()
    held.release()
    assert not run.exists() and (moved / ".lock").read_bytes() == b""


def test_nobody_looks_for_a_folder_while_it_is_moved(tmp_path, monkeypatch):
    run, moved = tmp_path / "run", tmp_path / "moved"
    run.mkdir()
    held, rename, lookers = RunLock(run, print), Path.rename, []
    held.acquire()

    def and_look(self, target):
        rename(self, target)
        lookers.append(threading.Thread(target=held.look))
        lookers[0].start()
        lookers[0].join(0.3)  # before the lock knows where it is now

    monkeypatch.setattr(Path, "rename", and_look)
    held.move(moved)
    lookers[0].join()
    held.check()
    held.release()


def test_a_folder_that_cannot_be_moved_is_held_where_it_is(tmp_path):
    run, taken = tmp_path / "run", tmp_path / "taken"
    run.mkdir(), taken.mkdir()
    (taken / "file").touch()
    held = RunLock(run, print)
    held.acquire()
    with pytest.raises(OSError):
        held.move(taken)
    held.look()
    held.check()
    held.release()


def test_a_folder_taken_over_is_noticed_and_left_to_the_other(tmp_path):
    with open_run_dir(tmp_path, CONFIG) as held:
        other = content(tmp_path) | {"token": "other", "pid": 7, "host": "elsewhere"}
        (tmp_path / ".lock").write_text(json.dumps(other))
        held.look()
        with pytest.raises(FolderLost, match="process 7 on elsewhere has taken"):
            held.check()
    assert content(tmp_path) == other


def test_halves_of_files_that_a_kill_left_are_removed(tmp_path):
    with open_run_dir(tmp_path, CONFIG):
        pass
    (tmp_path / ".config.json.4711").write_text("{")
    (tmp_path / ".mine.txt").touch()
    with open_run_dir(tmp_path, CONFIG):
        pass
    hidden = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert hidden == {".lock", ".mine.txt"}
