"""Stopping a run politely: the first signal finishes the step, the second one ends."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from uoe_jax.errors import UoeError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRun(UoeError):
    """The run was asked to stop and has saved; exit code 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class StopSignals:
    """Context that notes SIGTERM and Ctrl-C in `received` instead of dying of them.

    After the first signal the next one acts at once. Outside the main thread, where
    Python allows no handlers, nothing is caught.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        # The default action ends the process even inside compiled code; a notebook's
        # process must survive, there a second Ctrl-C raises KeyboardInterrupt.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        notebook = "ipykernel" in sys.modules or hasattr(sys, "ps1")
        second = signal.default_int_handler if notebook else signal.SIG_DFL
        signal.signal(signal.SIGINT, second)
