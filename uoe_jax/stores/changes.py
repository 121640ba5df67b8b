"""What this process changes in stores, one object at a time, in the order asked."""

from __future__ import annotations

import threading


class Changes:
    """The writes and removals under way, by address: of one object one at a time.

    One that nobody waits for any more goes on in its thread. Without a turn it would
    arrive over what was sent meanwhile, or after what was deleted.
    """

    def __init__(self) -> None:
        self._given_up: dict[str, bool] = {}  # of each one under way
        self._ended = threading.Condition()

    def begin(self, place: str, seconds: float) -> bool:
        """Wait until nothing else changes an object; whether that came in time."""
        with self._ended:
            free = self._ended.wait_for(lambda: place not in self._given_up, seconds)
            if free:
                self._given_up[place] = False
            return free

    def end(self, place: str) -> None:
        """Note that a change has come, or never will."""
        with self._ended:
            self._given_up.pop(place, None)
            self._ended.notify_all()

    def give_up(self, place: str) -> None:
        """Note that nobody waits for a change any more, if it is still under way."""
        with self._ended:
            if place in self._given_up:
                self._given_up[place] = True

    def late(self, below: str, seconds: float = 0.0) -> str | None:
        """Return what was given up below an address and hasn't ended in so long."""

        def first() -> str | None:
            left = (n for n, gone in self._given_up.items() if gone)
            return next((name for name in left if name.startswith(below)), None)

        with self._ended:
            self._ended.wait_for(lambda: first() is None, seconds)
            return first()


CHANGES = Changes()  # of this process: several copies may be of one address
