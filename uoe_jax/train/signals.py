"""Stopping a run politely: the first signal finishes the step, the second one ends."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from types import FrameType
from typing import Any

from uoe_jax.errors import UoeError
from uoe_jax.terminal import (
    STOP_SIGNALS,
    end_at_second_signal,
    handles_signals,
    in_notebook,
    is_ignored,
)


class StopRun(UoeError):
    """The run was asked to stop and has saved; exit code 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class StopSignals:
    """Context that notes SIGTERM, SIGHUP and Ctrl-C in `received`, not dying of them.

    After the first signal the next SIGTERM or Ctrl-C acts at once. A signal that was
    ignored, as SIGHUP under nohup, stays so. Outside the main thread, where Python
    allows no handlers, nothing is caught.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> StopSignals:
        if handles_signals():
            self._stack.enter_context(end_at_second_signal())
            for number in STOP_SIGNALS:
                if not is_ignored(number):
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._stack.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        if number == signal.SIGHUP:
            return
        # The default action ends the process even inside compiled code; a notebook's
        # process must survive, there a second Ctrl-C raises KeyboardInterrupt.
        if signal.SIGTERM in self._previous:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if signal.SIGINT in self._previous:
            second = signal.default_int_handler if in_notebook() else signal.SIG_DFL
            signal.signal(signal.SIGINT, second)
