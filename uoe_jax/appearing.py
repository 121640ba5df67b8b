"""Files that appear together or not at all, and what killed processes leave of them.

Imports no jax.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_HIDDEN = ".unfinished."  # begins the name of a folder; a process's number ends it


@contextmanager
def appearing_together(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder in one; its files move up at the end, all or none.

    The folder is made where it isn't there, and not left behind empty. What killed
    processes left is removed.
    """
    for old in folder.glob(f"{_HIDDEN}*"):
        if not _is_alive(old.name.removeprefix(_HIDDEN)):
            shutil.rmtree(old, ignore_errors=True)
    unfinished, made = folder / f"{_HIDDEN}{os.getpid()}", not folder.exists()
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        try:
            _move_up(unfinished)
        except KeyboardInterrupt:  # half of them would be worse
            _move_up(unfinished)
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if made:
            with suppress(OSError):  # it holds what was written
                folder.rmdir()


def _move_up(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        file.replace(folder.parent / file.name)


def _is_alive(pid: str) -> bool:
    """Whether a process of this machine has a number."""
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return True


def remove_unfinished(folder: Path) -> None:
    """Delete what kills in the middle of `write_atomically` left in a folder.

    For a folder that no other process writes into.
    """
    for file in folder.glob(".*.*"):
        if file.suffix[1:].isdecimal() and file.is_file():
            file.unlink(missing_ok=True)
