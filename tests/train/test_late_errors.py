"""Writes that end after their save has failed say nothing; all else is told."""

import asyncio
import gc
import logging
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


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("RESOURCE_EXHAUSTED: Error writing local file: No space left on device", 0),
        ("a fault of the program", 1),
    ],
)
def test_an_array_whose_failure_nobody_waited_for_is_not_logged(text, told, caplog):
    _drop_late_errors()
    loop = asyncio.new_event_loop()
    with caplog.at_level(logging.ERROR, logger="asyncio"):
        future = loop.create_future()
        future.set_exception(ValueError(text))
        del future
        gc.collect()
    loop.close()
    assert len(caplog.records) == told
