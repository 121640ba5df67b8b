"""Writes that end after their save has failed say nothing; all else is told."""

import sys
from types import SimpleNamespace

import pytest

from uoe_jax.runs.checkpoint import _drop_late_errors


@pytest.mark.parametrize("text", ["Event loop is closed", "something else"])
def test_late_errors_are_dropped_by_both_of_pythons_hooks(text, monkeypatch):
    told = []
    monkeypatch.setattr(sys, "excepthook", lambda *found: told.append("raised"))
    monkeypatch.setattr(sys, "unraisablehook", lambda found: told.append("dropped"))
    _drop_late_errors()
    _drop_late_errors()  # at every save
    error = RuntimeError(text)
    sys.excepthook(RuntimeError, error, None)
    sys.unraisablehook(SimpleNamespace(exc_value=error))
    assert told == ([] if text.startswith("Event") else ["raised", "dropped"])
