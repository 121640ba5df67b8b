"""What a person sees of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from uoe_jax.escape import escape_line
from uoe_jax.terminal import sturdy, what_failed


class Display:
    """Notes and step lines of one run; `quiet` leaves only warnings, on stderr."""

    def __init__(self, *, quiet: bool = False, log_every: int = 1):
        self.quiet = quiet
        self.log_every = log_every
        self._out, self._err = sturdy(sys.stdout), sturdy(sys.stderr)
        self.console = Console(
            file=cast(TextIO, self._out),
            soft_wrap=True,
            highlight=False,
            markup=False,
            emoji=False,
        )
        self._total = 0
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, step: int, total: int) -> None:
        """Begin showing progress from `step` to `total`."""
        self._total = total
        if self.quiet or not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._bar.add_task("", total=total, completed=step)
        self._bar.start()

    def note(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        if not self.quiet:
            self.console.print(escape_line(text))
            self._tell_if_mute()

    def warn(self, text: str) -> None:
        """Print one line to stderr, quiet or not."""
        print(f"warning: {escape_line(text)}", file=self._err, flush=True)

    def _tell_if_mute(self) -> None:
        """Say once that nobody gets the lines any more."""
        if failed := what_failed(self._out):
            self.warn(f"{failed}; training continues without it")

    def step(self, line: Mapping[str, Any]) -> None:
        """Show a training line: always on the bar, every `log_every` steps as text."""
        text = describe(line)
        if self._bar is not None:
            self._bar.update(self._task, completed=line["step"], description=text)
            self._tell_if_mute()
        elif line["step"] % self.log_every == 0 or line["step"] == self._total:
            eta = self._seconds_left(line)
            self.note(f"step {line['step']}/{self._total}  {text}{eta}")

    def _seconds_left(self, line: Mapping[str, Any]) -> str:
        """Return the time left at the rate of the last steps, the first not in it."""
        if not line["tokens_per_second"]:
            return ""
        tokens = (self._total - line["step"]) * line["tokens"] / line["step"]
        return f"  {tokens / line['tokens_per_second']:.0f} s left"


def describe(line: Mapping[str, Any]) -> str:
    """Return loss, tokens per second and MFU of a training line."""
    parts = [f"loss {line['loss']:.4f}"]
    if line["tokens_per_second"]:
        parts.append(f"{line['tokens_per_second']:,.0f} tokens/s")
    if line["mfu"] is not None:
        parts.append(f"MFU {line['mfu']:.1%}")
    if line["skipped"]:
        parts.append(f"{line['skipped']} skipped")
    return "  ".join(parts)
