"""What a results file says of where its numbers come from, and how it is written."""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uoe_jax.files import format_json


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a script that writes a record: --commit and --out."""
    parser.add_argument("--commit", help="stated where git isn't there to ask")
    parser.add_argument("--out", type=Path)


def commit() -> str:
    """Return this checkout's commit, or "unknown" outside git."""
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"


def made_with(device: str | None = None) -> dict[str, Any]:
    """Return what numbers were made with: the device by name, jax, XLA's flags."""
    import jax  # not where commands only ask for a commit

    return {
        "device": device or jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def header(
    command: str, stated: str | None = None, device: str | None = None
) -> dict[str, Any]:
    """Return a record's first lines; `stated` is the commit where git can't say it."""
    return {"command": command, "commit": stated or commit(), **made_with(device)}


def write_record(path: Path | None, record: Mapping[str, Any]) -> None:
    """Write a record so far, if there is where to: a run that is cut short keeps it."""
    if path:
        path.write_text(format_json(record, indent=1) + "\n")
