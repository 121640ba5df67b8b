"""Who trains in a store's folder: an object that only one process can create."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from uoe_jax.errors import DataError
from uoe_jax.files import format_json, parse_json
from uoe_jax.runs import lock
from uoe_jax.runs.lock import Locked, RunLock
from uoe_jax.runs.stored import LOCK
from uoe_jax.stores.mirror import Mirror, mirror_of
from uoe_jax.stores.objects import ANSWER_SECONDS, StoreError

_LOOKS = 4  # at a silent holder's lock, in one interval of its signs of life
# Between taking a lock over and being its holder. Who else found it silent has written
# by then, as nobody may take longer from the last look to the end of the write.
SETTLE_SECONDS = ANSWER_SECONDS


def make_lock(folder: Path, note: Callable[[str], None]) -> RunLock:
    """Return the lock of a run's folder, of a store's copy that of both."""
    found = mirror_of(folder)
    return RunLock(folder, note) if found is None else StoreLock(found[0], note)


class StoreLock(RunLock):
    """The lock of a run in a store, beside that of its copy.

    It is created where it isn't there: the store says who was first. Its holder writes
    it anew every `BEAT_SECONDS`; one that doesn't for `GONE_SECONDS` is gone, as is a
    process of this machine that has ended. Of several that take a lock over, the last
    one to write has it: each looks again when all have written.
    """

    def __init__(
        self, mirror: Mirror, note: Callable[[str], None], folder: Path | None = None
    ):
        """`folder`: where the copy comes from, if it is written elsewhere first."""
        folder = folder or mirror.folder
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder, note)
        self._mirror, self._objects = mirror, mirror.objects
        self._note, self._ours = note, False

    def acquire(self) -> None:
        """Take the lock; raise Locked where its holder may live.

        The copy is then made what the store has: nobody else writes there.
        """
        content = self._content()
        if not self._objects.create(LOCK, content):
            self._take_over()
        self._ours = True
        self._mirror.pull()
        super().acquire()

    def look(self) -> None:
        """Look whether both are still this process's; `check` raises if not."""
        super().look()
        with suppress(StoreError):  # a store that is away for a while
            owner = self._owner()
            if owner.get("token") != self._me["token"]:
                who = lock.owner_name(owner) if owner else "somebody"
                self._lost = (
                    f"{who} has taken {self._mirror.address} over, as this process "
                    f"gave no sign of life for {lock.GONE_SECONDS:.0f} s"
                )

    def release(self) -> None:
        """Stop the signs of life and give the lock back, if it is still held."""
        super().release()
        if not self._ours:
            return
        with suppress(StoreError):  # then it is found silent
            if self._owner().get("token") == self._me["token"]:
                self._objects.remove([LOCK])

    def _content(self) -> bytes:
        return format_json(self._me).encode()

    def _owner(self) -> dict:
        try:
            owner = parse_json(self._objects.read(LOCK) or b"{}", "the lock")
        except DataError:
            return {}
        return owner if isinstance(owner, dict) else {}

    def _take_over(self) -> None:
        looked: float | None = time.monotonic()
        owner = self._owner()
        who, place = lock.owner_name(owner), self._mirror.address
        here = owner.get("machine") and owner.get("machine") == self._me["machine"]
        if not here or owner.get("host") != self._me["host"]:
            looked = self._stays_silent(owner)
        elif lock.is_alive(owner):
            looked = None
        if looked is None:
            raise Locked(
                f"{who} is training in {place}; stop it or choose another --run-dir"
            )
        self._note(
            f"taking over the lock of {who}, which is gone: waiting "
            f"{SETTLE_SECONDS:.0f} s for others that do"
        )
        self._objects.write(LOCK, self._content())
        if time.monotonic() - looked > ANSWER_SECONDS:
            raise StoreError(
                f"{place} took over {ANSWER_SECONDS:.0f} s to take the lock of {who} "
                "over, and another process may have taken it meanwhile; run it again"
            )
        time.sleep(SETTLE_SECONDS)  # two that recover it at once both came so far
        if self._owner().get("token") != self._me["token"]:
            raise Locked(
                f"another process is training in {place}; choose another --run-dir"
            )
        self._note(f"recovered the lock of {who}, which is gone")

    def _stays_silent(self, owner: dict) -> float | None:
        """Return when the last look began; None if the holder gave a sign of life."""
        self._note(
            f"{lock.owner_name(owner)} was training in {self._mirror.address}: waiting "
            f"{lock.GONE_SECONDS:.0f} s for a sign of life"
        )
        looked = time.monotonic()
        end = looked + lock.GONE_SECONDS
        while looked < end:
            time.sleep(lock.BEAT_SECONDS / _LOOKS)
            looked = time.monotonic()
            if self._owner() != owner:
                return None
        return looked

    def _write(self) -> None:
        super()._write()
        if self._ours:
            with suppress(StoreError):
                self._objects.write(LOCK, self._content())
