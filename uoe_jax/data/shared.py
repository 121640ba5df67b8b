"""Prepared data that processes and machines share: one prepares, the others wait.

On a file system by a lock beside the folder; in a store (`data.cache_dir gs://...`) by
copies, whose manifest is sent last.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from uoe_jax.config import DataConfig
from uoe_jax.data.progress import note
from uoe_jax.data.store import MANIFEST, STAMPS, build_folder, read_manifest
from uoe_jax.stores.mirror import Mirror
from uoe_jax.stores.objects import address_of

_LOCK = ".preparing-"


@contextmanager
def one_at_a_time(folder: Path, name: str) -> Iterator[None]:
    """Wait while another process prepares a folder, then be the only one that does.

    The lock ends with its holder, however it ends. Where a file system has no locks,
    or can't be written, nobody waits.
    """
    held, path = None, folder.with_name(f"{_LOCK}{folder.name}")
    try:
        with suppress(OSError):
            folder.parent.mkdir(parents=True, exist_ok=True)
            held = _locked(path, name)
        yield
    finally:
        if held is not None:
            path.unlink(missing_ok=True)  # whoever waits for it sees that it is gone
            os.close(held)


def _locked(path: Path, name: str) -> int:
    """Return an open file of a path, locked; raise OSError where that can't be."""
    said = False
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not said:
                    note(f"another process prepares {name}: waiting for it")
                said = True
                fcntl.flock(file, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):  # its holder has deleted it
                if os.stat(path).st_ino == os.fstat(file).st_ino:
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def bring(folder: Path, data: DataConfig, name: str) -> None:
    """Fetch prepared data that another machine has put into `data.cache_dir`.

    Nothing is done where that is no store, where it is here already, or where it isn't
    there. Raises StoreError for a store that can't be used.
    """
    address = address_of(data.cache_dir)
    if address is None or read_manifest(folder) is not None:
        return
    place = f"{address}/{folder.name}"
    there = Mirror(place, folder).objects
    sizes = there.list()
    if MANIFEST not in sizes:
        return
    note(f"fetching {name} from {place}, {sum(sizes.values()) / 1e6:,.1f} MB")
    with build_folder(folder, replace=folder.exists()) as building:
        there.download(sizes, building)


def send(folder: Path, data: DataConfig) -> None:
    """Put prepared data into `data.cache_dir`, where that is a store."""
    address = address_of(data.cache_dir)
    if address is None:
        return
    there = Mirror(f"{address}/{folder.name}", folder)
    # File times are of this machine; another one's hashes are checked instead.
    names = [name for name in there.changed() if name != STAMPS]
    there.push(names, last=MANIFEST)
