"""Files that appear together, whenever the process is stopped or killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from uoe_jax import appearing
from uoe_jax.appearing import appearing_together, remove_unfinished


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


def write_two(folder, stop=None, text="new"):
    with appearing_together(folder) as unfinished:
        (unfinished / "a").write_text(text)
        if stop is not None:
            raise stop
        (unfinished / "b").write_text(text)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(28, "No space")])
def test_an_end_in_the_middle_leaves_what_was_there(tmp_path, stop):
    with pytest.raises(type(stop)):
        write_two(tmp_path / "out", stop)
    assert names(tmp_path) == []
    write_two(tmp_path / "out", text="old")
    with pytest.raises(type(stop)):
        write_two(tmp_path / "out", stop)
    assert names(tmp_path) == ["a", "b", "out"]
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_a_signal_while_they_move_moves_the_rest(tmp_path, monkeypatch):
    replace, moved = Path.replace, []

    def interrupted(self, target):
        moved.append(target)
        if len(moved) == 2:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(appearing.Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_two(tmp_path / "out")
    assert names(tmp_path) == ["a", "b", "out"]


def test_what_a_killed_process_left_is_removed_and_a_living_ones_stays(tmp_path):
    child = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
    )
    dead, living = (f".unfinished.{n}" for n in (child.stdout.strip(), os.getppid()))
    for name in (dead, living):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").touch()
    write_two(tmp_path)
    assert names(tmp_path) == [living, "a", "b", "part"]


def test_leftovers_of_single_files_go_and_others_stay(tmp_path):
    for name in (".adapt.json.71", ".config.json.1", ".lock", ".a.txt", "b.json.3"):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    assert names(tmp_path) == [".a.txt", ".lock", "b.json.3"]
