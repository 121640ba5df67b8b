"""Errors a user can act on: one line with the value, the rule and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UoeError(Exception):
    """A problem with a one-line message; the command line exits with `exit_code`."""

    exit_code = 1


class ConfigError(UoeError, ValueError):
    """A request that can't be carried out; found before anything compiles."""

    exit_code = 2


class DataError(UoeError, ValueError):
    """Data that is missing, empty, malformed or not what its manifest says."""

    exit_code = 2


class CheckpointError(UoeError, ValueError):
    """A checkpoint that is absent, foreign, incomplete or corrupt."""

    exit_code = 2


class NonFiniteError(UoeError, FloatingPointError):
    """Too many steps in a row had a non-finite loss or gradient."""

    exit_code = 3


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean ...?" with the closest known names, or the whole list."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    return "known: " + ", ".join(known)
