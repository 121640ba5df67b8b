"""Runs chosen, sorted and shown by their outcomes and settings."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from uoe_jax.errors import DataError, shown
from uoe_jax.runs.leaves import Path, find_setting, settings_of
from uoe_jax.runs.read import RunRecord
from uoe_jax.runs.search import ABSENT, show_value

OUTCOMES = (
    "loss", "bits_per_byte", "accuracy", "seconds", "steps", "tokens", "parameters",
)  # fmt: skip
_OWN = ("name", "path", "seed", "status", "model", "date")
_TEST = re.compile(r"\s*([^<>=!~\s]+)\s*(<=|>=|!=|==|=|<|>|~)\s*(.*?)\s*$", re.DOTALL)
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def value_of(record: RunRecord, name: str | Path) -> Any:
    """Return a run's outcome, its name, path, seed and so on, or a setting."""
    if isinstance(name, tuple):
        return settings_of(record.settings).get(name)
    if name in OUTCOMES:
        return record[name]
    return getattr(record, name)


def resolve(name: str, records: Sequence[RunRecord]) -> str | Path:
    """Return what a person calls a column; DataError, naming the nearest, for none."""
    if name in OUTCOMES or name in _OWN:
        return name
    known = {path for record in records for path in settings_of(record.settings)}
    return find_setting(name, known)


def select(
    records: Sequence[RunRecord],
    where: Sequence[str] = (),
    sort: str = "loss",
    descending: bool = False,
) -> list[RunRecord]:
    """Return the runs that pass every test, sorted; those without the value last.

    Tests are such as `optim.learning_rate>=0.001`, `mlp=union`, `path~wiki` (holds).
    Raises DataError for a test or a name that can't be read.
    """
    if not records:
        return []
    found = list(records)
    for test in where:
        passes = _make_test(test, records)
        found = [record for record in found if passes(record)]
    column = resolve(sort, records)

    def key(record: RunRecord) -> tuple[int, float, str]:
        value = value_of(record, column)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return 0, float(value), ""
        return (2, 0.0, "") if value is None else (1, 0.0, str(value))

    found.sort(key=lambda record: record.path)
    there = [r for r in found if value_of(r, column) is not None]
    there.sort(key=key, reverse=descending)
    return there + [r for r in found if value_of(r, column) is None]


def _make_test(text: str, records: Sequence[RunRecord]) -> Callable[[RunRecord], bool]:
    read = _TEST.match(text)
    if read is None:
        raise DataError(
            f"the test {shown(text)} can't be read; write NAME=VALUE, or with "
            "!=, <, <=, >, >= or ~ (holds)"
        )
    column, sign, given = resolve(read[1], records), read[2], read[3]
    number = _as_number(given)
    if sign in ("<", "<=", ">", ">=") and number is None:
        raise DataError(f"the test {shown(text)} compares with {shown(given)}; "
                        "give a number")  # fmt: skip

    def passes(record: RunRecord) -> bool:
        value = value_of(record, column)
        if sign == "~":
            return given.lower() in _plain(value).lower()
        if sign in ("=", "==", "!="):
            return (sign == "!=") != _is_equal(value, given, number)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return False
        assert number is not None
        less, more = value < number, value > number
        return {"<": less, ">": more, "<=": not more, ">=": not less}[sign]

    return passes


def _is_equal(value: Any, given: str, number: float | None) -> bool:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return number is not None and math.isclose(value, number, rel_tol=1e-9)
    return _plain(value).lower() == given.lower()


def _plain(value: Any) -> str:
    return "none" if value is None else show_value(value)


def _as_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def show_column(record: RunRecord, name: str) -> str:
    """Return one cell of a table of runs."""
    try:
        value = value_of(record, resolve(name, [record]))
    except DataError:  # a setting that other runs have
        value = None
    if value is None or value == "":
        return ABSENT
    if name in ("date", "model"):
        return value
    if name in ("parameters", "tokens"):
        return _with_unit(value)
    if name == "steps":
        return f"{value:.0f}"
    if name in OUTCOMES:
        return f"{value:.1f}" if name == "seconds" else f"{value:.4f}"
    return show_value(value)


def _with_unit(value: float) -> str:
    for scale, unit in _UNITS:
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f}"
