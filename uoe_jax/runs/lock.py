"""Who trains in a folder: a lock that its holder keeps alive, and others can judge."""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from uoe_jax.errors import ConfigError, UoeError
from uoe_jax.files import format_json, parse_json

NAME = ".lock"
BEAT_SECONDS = 10.0  # between two signs of life
GONE_SECONDS = 60.0  # without one: the holder is gone
_BYTES = 512  # of the lock's content, padded: beats never need room


class Locked(ConfigError):
    """Another process holds the lock."""


class FolderLost(UoeError):
    """The run's folder isn't this process's any more."""


class RunLock:
    """The lock of a run's folder.

    The kernel frees it when its holder dies, however it dies. Where a file system has
    no such locks, or the holder was on another machine, its signs of life decide: a
    thread writes one every `BEAT_SECONDS`. It also sees when the folder is renamed, but
    by `move`.
    """

    def __init__(self, folder: Path, note: Callable[[str], None]):
        self._path, self._note = folder / NAME, note
        self._folder = folder
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        self._me: dict[str, Any] = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "machine": _machine(),
            "started": _started(os.getpid()),
            "token": secrets.token_hex(8),
            "beat": 0,
        }
        self._lost: str | None = None
        self._moving = threading.Lock()  # nobody looks where the folder just isn't
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock; raise Locked where its holder may live."""
        locked = _flock(self._file)
        owner = _read(self._file)
        who = owner_name(owner)
        busy = f"{who} is training in {self._folder}; stop it or choose another "
        busy += "--run-dir"
        if locked is False or (owner and locked is None and is_alive(owner)):
            raise Locked(busy)
        if owner and not self._is_gone(owner, locked is True):
            if "beat" in owner:
                raise Locked(busy)
            raise Locked(
                f"{who} was training in {self._folder} and didn't end cleanly; if it "
                f"is gone, delete {self._path}"
            )
        if owner:
            self._note(f"recovered the lock of {who}, which is gone")
        self._write()
        if locked is None:  # two that start at once both came so far
            time.sleep(0.1)
            if _read(self._file).get("token") != self._me["token"]:
                raise Locked(busy)
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise FolderLost if the folder was seen to be another's, or elsewhere."""
        if self._lost:
            raise FolderLost(self._lost)

    def move(self, folder: Path) -> None:
        """Rename the folder, which stays this process's; raises OSError as a rename."""
        with self._moving:
            self._folder.rename(folder)
            self._folder, self._path = folder, folder / NAME

    def look(self) -> None:
        """Look whether the folder is still this process's; `check` raises if not."""
        with self._moving:
            self._look()

    def _look(self) -> None:
        try:
            here = os.stat(self._path).st_ino == os.fstat(self._file).st_ino
        except FileNotFoundError:
            here = False
        except OSError:  # a file server that is away for a while
            return
        owner = _read(self._file)
        if not here:
            self._lost = (
                f"{self._folder} was renamed, deleted or replaced while this run "
                "trained in it; what was saved is where it was moved to: name that "
                "folder to go on"
            )
        elif owner and owner.get("token") != self._me["token"]:
            self._lost = (
                f"{owner_name(owner)} has taken {self._folder} over, as this one gave "
                f"no sign of life for {GONE_SECONDS:.0f} s"
            )

    def release(self) -> None:
        """Stop the signs of life and give the lock back, if it is still held."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            if _read(self._file).get("token") == self._me["token"]:
                os.ftruncate(self._file, 0)
        os.close(self._file)

    def _is_gone(self, owner: dict[str, Any], locked: bool) -> bool:
        """Whether the holder that a lock names is gone; waits for a sign of life."""
        if owner.get("host") == self._me["host"]:
            # The kernel's own lock is proof, as is a process that isn't there.
            if locked or owner.get("machine") == self._me["machine"]:
                return True
        if "beat" not in owner:
            return False
        age = self._age()
        if age < GONE_SECONDS:
            self._note(
                f"{owner_name(owner)} was training in {self._folder}: waiting "
                f"{GONE_SECONDS - age:.0f} s for a sign of life"
            )
        end = time.monotonic() + GONE_SECONDS - age
        while time.monotonic() < end:
            time.sleep(min(1.0, BEAT_SECONDS / 4))
            # Opened anew: a network file system asks its server then.
            with suppress(OSError), self._path.open("rb") as file:
                if _read(file.fileno()) != owner:
                    return False
        return True

    def _age(self) -> float:
        """Return the seconds since the last sign of life, by the file's own clock."""
        probe = self._path.with_name(f".{NAME}.{os.getpid()}")
        try:
            probe.touch()
            return max(probe.stat().st_mtime - os.fstat(self._file).st_mtime, 0.0)
        finally:
            probe.unlink(missing_ok=True)

    def _write(self) -> None:
        os.pwrite(self._file, format_json(self._me).encode().ljust(_BYTES), 0)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self.look()
            if self._lost:
                return
            self._me["beat"] += 1
            with suppress(OSError):
                self._write()


def holder(folder: Path) -> str | None:
    """Return who trains in a folder now, as "process 7 on host"; None for nobody."""
    try:
        file = os.open(folder / NAME, os.O_RDWR)
    except OSError:
        return None
    try:
        locked, owner = _flock(file), _read(file)
        busy = locked is False or (owner and locked is None and is_alive(owner))
        return owner_name(owner) if busy else None
    finally:
        os.close(file)


def _flock(file: int) -> bool | None:
    """Lock a file: True, False if another has, None if its file system can't."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _read(file: int) -> dict[str, Any]:
    try:
        owner = parse_json(os.pread(file, 4096, 0), "the lock")
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def owner_name(owner: dict[str, Any]) -> str:
    """Return who holds a lock, by its content: "process 7 on host"."""
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"


def _machine() -> str:
    """Return what tells one boot of one machine, or container, from another."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return when a process began, in ticks since the boot; "" where unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]  # field 22, counted from the pid


def is_alive(owner: dict[str, Any]) -> bool:
    """Whether the process that a lock names runs on this machine."""
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or type(pid) is not int or pid < 1:
        return False
    if owner.get("machine", _machine()) != _machine():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # of another user
    return owner.get("started", _started(pid)) == _started(pid)
