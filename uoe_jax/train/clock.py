"""Time and throughput of a run."""

from __future__ import annotations

import time
from collections import deque

from uoe_jax.runs.state import Progress


class Clock:
    """Adds training seconds and elapsed wall clock to a Progress."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._start = time.perf_counter()
        self._since: float | None = None
        self._before = 0.0

    def resume(self, progress: Progress) -> Progress:
        """Continue the totals of an earlier process; return them."""
        self._progress = progress
        self._start -= progress.elapsed
        return progress

    def run(self) -> None:
        """Start counting training seconds, if they aren't counted already."""
        if self._since is None:
            self._since = time.perf_counter()
            self._before = self._progress.seconds

    def pause(self) -> None:
        """Stop counting training seconds."""
        self.update()
        self._since = None

    def update(self) -> None:
        """Bring the progress up to now."""
        now = time.perf_counter()
        self._progress.elapsed = now - self._start
        if self._since is not None:
            self._progress.seconds = self._before + now - self._since


class Rate:
    """Tokens per second over the last few steps, without the first.

    While that one runs, what comes with it is compiled; the second's metrics are then
    read at once, as if it had taken no time.
    """

    def __init__(self, window: int):
        self._first = True
        self._points: deque[tuple[float, int]] = deque(maxlen=max(window, 1) + 1)

    def add(self, seconds: float, tokens: int) -> float | None:
        """Note the totals after a step; return the rate since the oldest one kept."""
        if self._first:
            self._first = False
            return None
        self._points.append((seconds, tokens))
        first = self._points[0]
        passed = seconds - first[0]
        return (tokens - first[1]) / passed if passed > 0 else None
