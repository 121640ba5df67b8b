"""Regular expressions of a foreign file, matched within a time limit.

Python's `re` backtracks: `(a+)+$` takes longer than anybody waits on forty letters. A
pattern that can't backtrack is matched here; any other one in a process of its own,
which can be ended.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence

from uoe_jax.files import format_json, parse_json

SECONDS = 10.0  # for all patterns of a file, the start of the process included
_LONGEST = 1000  # characters of a pattern

# Letters, dots, escaped signs, and runs of digits that something else ends.
_PLAIN = re.compile(r"\^?(?:[\w.-]|\\[^\w\s]|\\d\+?(?=[^\\\d.+]|\\[^\w\s]|$))*\$?")

_MATCHER = """
import json, re, sys
patterns, names = json.load(sys.stdin)
wholes = [re.compile(rf"(.*\\.)?({pattern})") for pattern in patterns]
found = [next((i for i, w in enumerate(wholes) if w.fullmatch(n)), None) for n in names]
json.dump(found, sys.stdout)
"""


def first_matches(patterns: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Return the first pattern that matches the end of each name, from a dot on.

    Names that none matches are left out. Raises ValueError for a pattern that isn't a
    regular expression, is too long or takes too long.
    """
    for pattern in patterns:
        if len(pattern) > _LONGEST:
            raise ValueError(
                f"a pattern of {len(pattern)} characters; at most {_LONGEST} are read"
            )
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"pattern {pattern!r}: {error}") from None
    if all(_PLAIN.fullmatch(pattern) for pattern in patterns):
        found = _match_here(patterns, names)
    else:
        found = _match_apart(patterns, names)
    pairs = zip(names, found, strict=True)
    return {name: patterns[index] for name, index in pairs if index is not None}


def _match_here(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    wholes = [re.compile(rf"(.*\.)?({pattern})") for pattern in patterns]
    return [
        next((i for i, whole in enumerate(wholes) if whole.fullmatch(name)), None)
        for name in names
    ]


def _match_apart(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """Return what `_match_here` does, or raise ValueError when the time is up."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCHER],
            input=format_json([list(patterns), list(names)]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        odd = next(p for p in patterns if not _PLAIN.fullmatch(p))
        raise ValueError(
            f"patterns that take more than {SECONDS:g} s to match, {odd!r} among them; "
            "write module names without nested repeats"
        ) from None
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"patterns that can't be matched ({error})") from None
    return parse_json(done.stdout, "the matcher")
