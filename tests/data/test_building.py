"""Unfinished folders of prepared data: a killed builder's go, a living one's stay."""

import os
import signal
import subprocess
import sys

from uoe_jax.data import store
from uoe_jax.data.store import build_folder, remove_abandoned

PROGRAM = """
import os, signal, sys
from pathlib import Path
from uoe_jax.data.store import build_folder
with build_folder(Path(sys.argv[1]) / "target", replace=False) as content:
    (content / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_builder_left_is_removed(tmp_path):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".building-")
    remove_abandoned(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_living_builder_makes_stays(tmp_path):
    with build_folder(tmp_path / "target", replace=False) as content:
        (content / "file").write_text("x")
        remove_abandoned(tmp_path)
        assert (content / "file").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_folder_without_a_lock_goes_after_a_day(tmp_path):
    old, new = tmp_path / ".building-old", tmp_path / ".building-new"
    for path in (old, new):
        path.mkdir()
    os.utime(old, (0, 0))
    remove_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == [new]


def test_a_builder_that_has_just_begun_is_left_alone(tmp_path, monkeypatch):
    """It is locked before it has the name by which it is judged."""
    lock = store.fcntl.flock

    def clean_first(file, how):
        monkeypatch.setattr(store.fcntl, "flock", lock)
        remove_abandoned(tmp_path)
        lock(file, how)

    monkeypatch.setattr(store.fcntl, "flock", clean_first)
    with build_folder(tmp_path / "target", replace=False) as content:
        (content / "file").write_text("x")
    assert (tmp_path / "target" / "file").is_file()
