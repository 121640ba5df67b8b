"""What a results file says of where its numbers come from, and how it is written."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uoe_jax.files import format_json, read_json, write_atomically

ROOT = Path(__file__).parents[2]


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of a script that writes a record; `doc` is its docstring."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commit", help="stated where git isn't there to ask")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def commit() -> str:
    """Return this checkout's commit, or "unknown" outside git."""
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"


def command_line() -> str:
    """Return the command of this process as it is typed in the checkout's folder."""
    script = Path(sys.argv[0]).resolve()
    if script.is_relative_to(ROOT):
        script = script.relative_to(ROOT)
    return shlex.join(["python", script.as_posix(), *sys.argv[1:]])


def processor() -> str:
    """Return the processor by name, for what is timed on it, and its cores."""
    info = Path("/proc/cpuinfo")  # Linux only
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(":")[1].strip() for line in lines if "model name" in line)
    return f"{next(named, platform.processor())}, {os.cpu_count()} cores"


def made_with(device: str | None = None) -> dict[str, Any]:
    """Return what numbers were made with: the device by name, jax, XLA's flags."""
    import jax  # not where commands only ask for a commit

    return {
        "device": device or jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def header(
    command: str | None = None, stated: str | None = None, device: str | None = None
) -> dict[str, Any]:
    """Return a record's first lines; `stated` is the commit where git can't say it.

    The command is this process's own if none is given.
    """
    command = command_line() if command is None else command
    return {"command": command, "commit": stated or commit(), **made_with(device)}


def read_record(path: Path | None) -> dict[str, Any]:
    """Return the record that an earlier call wrote; empty where there is none."""
    return dict(read_json(path)) if path and path.exists() else {}


def write_record(path: Path | None, record: Mapping[str, Any]) -> None:
    """Write a record so far, if there is where to: a run that is cut short keeps it."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, format_json(record, indent=1) + "\n")
