"""The terminal and its signals: what is printed never ends the work it tells of.

Output that nobody reads any more (`| head`) or that has no room (`> /dev/full`) is
dropped. The first Ctrl-C, SIGTERM or SIGHUP ends a command in good order, the second
Ctrl-C or SIGTERM at once. Imports no jax.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_MOMENT = 0.02  # seconds


class Sturdy:
    """A text stream whose errors are kept in `error`, not raised.

    After the first error everything is dropped, what lay in buffers too.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self.error: OSError | None = None
        self.told = False  # whether somebody has said so

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush what was written."""
        self._try(self._stream.flush)

    def _try(self, act: Any) -> None:
        if self.error is not None:
            return
        try:
            act()
        except OSError as error:
            self.error = error
            # Python itself flushes at its end, and would fail there.
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)


def sturdy(stream: TextIO | Any) -> Sturdy:
    """Return a stream whose errors don't raise; one that is sturdy stays as it is."""
    return stream if isinstance(stream, Sturdy) else Sturdy(stream)


@contextmanager
def sturdy_output() -> Iterator[Sturdy]:
    """Make `sys.stdout` and `sys.stderr` sturdy for a while; yields the first."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, err = sturdy(before[0]), sturdy(before[1])
    try:
        yield out
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before


def what_failed(out: Sturdy) -> str | None:
    """Return in words what stopped an output, the first time one asks."""
    if out.error is None or out.told:
        return None
    out.told = True
    if nobody_reads(out.error):
        return "nobody reads the output any more"
    return f"standard output can't be written ({out.error.strerror})"


def nobody_reads(error: OSError) -> bool:
    """Whether an output failed because its reader has left."""
    return error.errno in (errno.EPIPE, errno.EIO)


class Stopped(KeyboardInterrupt):
    """A signal asked the command to end; like Ctrl-C it passes `except Exception`."""

    def __init__(self, number: signal.Signals):
        super().__init__(number.name)
        self.number = number


def in_notebook() -> bool:
    """Whether the process belongs to a person who goes on typing in it."""
    return "ipykernel" in sys.modules or hasattr(sys, "ps1")


def handles_signals() -> bool:
    """Whether this thread may set handlers, which Python allows the main one only."""
    return threading.current_thread() is threading.main_thread()


def is_ignored(number: signal.Signals) -> bool:
    """Whether whoever started the process wants a signal ignored, as nohup does."""
    return signal.getsignal(number) is signal.SIG_IGN


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise `Stopped` in the main thread on SIGTERM and SIGHUP, as Ctrl-C does."""
    if not handles_signals() or in_notebook():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number))

    before = {
        number: signal.signal(number, stop)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is signal.SIG_DFL
    }
    try:
        with end_at_second_signal(), _raise_again():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _raise_again() -> Iterator[None]:
    """Raise a moment later what a signal raised where Python drops exceptions.

    That is in callbacks of the garbage collector, of which JAX has one, of weak
    references, and in `__del__`. The command would else go on as if nobody had asked.
    Where somebody else uses the alarm, as a test with a time limit, it stays theirs.
    """
    if signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL:
        yield
        return
    lost: list[BaseException] = []
    before = sys.unraisablehook

    def keep(dropped: Any) -> None:
        if isinstance(dropped.exc_value, KeyboardInterrupt):
            lost.append(dropped.exc_value)
            # Not now: the callback is still running. An alarm isn't counted as the
            # second signal of a person who is impatient.
            signal.setitimer(signal.ITIMER_REAL, _MOMENT)
        else:
            before(dropped)

    def again(number: int, frame: FrameType | None) -> None:
        if lost:
            raise lost.pop().with_traceback(None)

    handler = signal.signal(signal.SIGALRM, again)
    sys.unraisablehook = keep
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = before
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def end_at_second_signal() -> Iterator[None]:
    """End the process at the second Ctrl-C or SIGTERM, even inside compiled code.

    Python's own handlers wait until the main thread is back from a call such as XLA's
    compiler, which may take minutes. The number of a signal that has a handler is
    written into a pipe at once; a thread reads it. SIGHUP isn't impatience: a terminal
    that closes sends one, its shell another, and systemd one after its SIGTERM.
    """
    if not handles_signals() or in_notebook():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    if before != -1:  # somebody watches already
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)
        yield
        return
    threading.Thread(
        target=_count_signals, args=(reader,), name="signals", daemon=True
    ).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        os.close(writer)  # which ends the thread


def _count_signals(reader: int) -> None:
    seen = 0
    while number := os.read(reader, 1):
        seen += number[0] in (signal.SIGINT, signal.SIGTERM)
        if seen > 1:
            with suppress(OSError):
                os.write(2, b"uoe: ended at once by the second signal\n")
            os._exit(128 + number[0])
    os.close(reader)
