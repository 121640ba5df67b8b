"""A progress bar for long preparations, and notes to the reader of the terminal."""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from uoe_jax.escape import escape_line

_PLAIN_EVERY = 10.0  # seconds between plain lines


def note(message: str) -> None:
    """Write one line to standard error."""
    with suppress(OSError):  # whoever reads has left: the work goes on
        print(escape_line(message), file=sys.stderr, flush=True)


@functools.cache
def note_once(message: str) -> None:
    """Write one line to standard error, the first time that it is to be said."""
    note(message)


@contextmanager
def unlogged() -> Iterator[None]:
    """Keep what packages log off the terminal.

    A client of a network logs each of its tries, of which the last error says all.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show work on `total` bytes; yields a function that adds bytes done.

    A bar on a terminal; elsewhere a line every ten seconds, none for short work.
    """
    if not sys.stderr.isatty():
        yield _plain(label, total)
        return
    from rich import markup
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(markup.escape(escape_line(label)), total=total)
        yield lambda count: bar.advance(task, count)


def _plain(label: str, total: int) -> Callable[[int], None]:
    done, last = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        if time.monotonic() - last > _PLAIN_EVERY:
            last = time.monotonic()
            note(f"{label}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB")

    return advance
