"""A local copy of a folder in a store: what it holds comes down, new files go up."""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from uoe_jax.escape import show_as
from uoe_jax.files import user_cache
from uoe_jax.stores.objects import Objects, StoreError

_HOLD = ".held"  # locked by the process that a folder is of, as long as it lives
_SHARED = "read"  # the folder of all processes that only read
_TRIES = 5  # to bring a folder that others change meanwhile


class Mirror:
    """A folder in a store, and its copy.

    The store is right: `pull` makes the copy what is there, but for what is `lazy`,
    which `fetch` brings when it is needed. `push` sends what changed here since.
    """

    def __init__(
        self,
        address: str,
        folder: Path,
        lazy: Callable[[str], bool] = lambda name: False,
        kept: Callable[[str], bool] = lambda name: False,
        needs: str | None = None,
        own: bool = False,
    ):
        """`lazy` and `kept` are of names: brought later, and never sent or deleted.

        `needs`: without this one nothing is brought. `own`: no other process works in
        the copy.
        """
        self.address, self.folder, self.own = address, folder, own
        self.objects = Objects(address)
        self.sizes: dict[str, int] = {}  # of the store's objects, as last seen
        self._lazy, self._kept, self._needs = lazy, kept, needs
        self._stamps: dict[str, tuple[int, int]] = {}
        self._turn = threading.RLock()  # an older version must not arrive later

    def pull(self) -> None:
        """Make the copy what the store has; a reader's is gone where it has nothing.

        Raises StoreError where that doesn't stand still.
        """
        for _ in range(_TRIES):
            self.sizes = sizes = self.objects.list()
            whole = self._needs is None or self._needs in sizes
            old = [n for n in self._local() if n not in sizes and not self._kept(n)]
            for name in old:
                (self.folder / name).unlink(missing_ok=True)
            wanted = {
                name: size
                for name, size in sizes.items()
                if whole and not self._lazy(name) and not self._kept(name)
            }
            with suppress(FileNotFoundError):  # it was there when they were listed
                self.objects.download(wanted, self.folder)
                break
        else:
            raise self._changing()
        self._remove_empty()
        if self.own:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._stamps = self._stamps_now()

    def fetch(self, names: Iterable[str]) -> None:
        """Bring objects, whatever is in their place.

        Raises StoreError where one is gone that was there.
        """
        wanted = {name: self.sizes[name] for name in names if name in self.sizes}
        try:
            self.objects.download(wanted, self.folder)
        except FileNotFoundError:
            raise self._changing() from None
        self._stamps |= {n: _stamp(self.folder / n) for n in wanted}

    def holds_any(self) -> bool:
        """Whether the store had something there, as last seen."""
        return any(not self._kept(name) for name in self.sizes)

    def changed(self) -> list[str]:
        """Return the files that the store doesn't have as they are here."""
        now = self._stamps_now()
        return sorted(n for n, stamp in now.items() if self._stamps.get(n) != stamp)

    def push(self, names: Iterable[str], last: str | None = None) -> None:
        """Send files; `last` after all others, as it says that they are there.

        A small one is sent as it is now, though another thread may go on writing it.
        """
        names = list(names)
        others = [name for name in names if name != last]
        with self._turn:
            stamps = {n: _stamp(self.folder / n) for n in names}
            # Before: where it fails, some are there. The last one says that all are.
            self.sizes |= {n: stamps[n][0] for n in others}
            self.objects.upload(others, self.folder)
            if last in names:
                self.objects.upload([last], self.folder)
            self._stamps |= stamps
            self.sizes |= {name: size for name, (size, _) in stamps.items()}

    def remove(self, names: Iterable[str], first: str | None = None) -> None:
        """Delete objects of the store; `first` before all others.

        That one even where it wasn't seen: a request that was given up may have come.
        Where one may still come, StoreError is raised, and what is after it stays.
        """
        with self._turn:
            names = [name for name in names if name in self.sizes]
            if first is not None and names:
                self.objects.remove([first])
            self.objects.remove(name for name in names if name != first)
            for name in names:
                self.sizes.pop(name, None)
                self._stamps.pop(name, None)

    def _changing(self) -> StoreError:
        return StoreError(f"{self.address} changed while it was read; run it again")

    def _local(self) -> list[str]:
        return [
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*")
            if path.is_file()
        ]

    def _stamps_now(self) -> dict[str, tuple[int, int]]:
        found = {}
        for name in self._local():
            if not self._kept(name):
                with suppress(FileNotFoundError):
                    found[name] = _stamp(self.folder / name)
        return found

    def _remove_empty(self) -> None:
        """Delete folders that hold no file any more, the copy itself too."""
        folders = [p for p in self.folder.rglob("*") if p.is_dir()]
        for folder in [*sorted(folders, reverse=True), self.folder]:
            with suppress(OSError):
                folder.rmdir()


def _stamp(file: Path) -> tuple[int, int]:
    about = file.stat()
    return about.st_size, about.st_mtime_ns


_MIRRORS: dict[Path, Mirror] = {}  # of this process, by their folders
_HELD: list[int] = []  # open files, locked until the process ends


def open_mirror(
    address: str,
    *,
    writes: bool,
    lazy: Callable[[str], bool] = lambda name: False,
    kept: Callable[[str], bool] = lambda name: False,
    needs: str | None = None,
) -> Mirror:
    """Return the copy of an address as the store has it now.

    Processes that only read share one, in the user's cache, where it stays; one that
    `writes` has its own, which is deleted when it ends, or by a later one. Raises
    StoreError also where the cache can't be written.
    """
    for found in _MIRRORS.values():
        if found.address == address and found.own == writes:
            found.pull()
            return found
    digest = hashlib.sha256(address.encode()).hexdigest()[:12]
    home = (user_cache() / "stores" / digest).absolute()
    try:
        home.mkdir(parents=True, exist_ok=True)
        place = home / (_own_folder(home) if writes else _SHARED)
    except OSError as error:
        raise StoreError(
            f"{address} is worked on in a copy, and {home} can't be written "
            f"({error.strerror}); set XDG_CACHE_HOME to a folder that can"
        ) from None
    folder = place / address.rsplit("/", 1)[-1]
    mirror = Mirror(address, folder, lazy, kept, needs, writes)
    mirror.pull()
    _MIRRORS[mirror.folder] = mirror
    show_as(str(mirror.folder), address)
    return mirror


def mirror_of(path: Path) -> tuple[Mirror, str] | None:
    """Return the copy that a path is in, and its name there; None elsewhere."""
    for folder in (path, *path.parents) if _MIRRORS else ():
        if folder in _MIRRORS:
            name = path.relative_to(folder).as_posix()
            return _MIRRORS[folder], "" if name == "." else name
    return None


def named(path: Path) -> str:
    """Return a path as others find it: its address, or the path as it is."""
    found = mirror_of(path)
    if found is None:
        return str(path)
    mirror, name = found
    return f"{mirror.address}/{name}".rstrip("/")


def _own_folder(home: Path) -> str:
    """Make a folder of this process, and delete those of processes that are gone."""
    for old in home.iterdir():
        if old.name != _SHARED and _is_free(old / _HOLD):
            shutil.rmtree(old, ignore_errors=True)
    own = home / f"{os.getpid()}-{secrets.token_hex(4)}"
    # Locked before it has its name: who finds it unlocked deletes the folder.
    unnamed = home / f".{own.name}"
    held = os.open(unnamed, os.O_RDWR | os.O_CREAT, 0o644)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    own.mkdir()
    unnamed.rename(own / _HOLD)
    _HELD.append(held)
    atexit.register(_end, own, os.getpid())
    return own.name


def _end(own: Path, pid: int) -> None:
    if os.getpid() == pid:  # not in what this process forked
        shutil.rmtree(own, ignore_errors=True)


def _is_free(hold: Path) -> bool:
    try:
        file = os.open(hold, os.O_RDWR)
    except OSError:  # it has just begun, or isn't one
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(file)
