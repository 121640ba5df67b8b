"""Text from elsewhere can't steer a terminal, and plain text stays as it is."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from uoe_jax.escape import escape, escape_line


@given(st.text())
def test_nothing_that_steers_is_left(text):
    shown = escape(text)
    left = {c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")}
    assert left <= {"\n", "\t"}
    shown.encode()
    line = escape_line(text)
    assert len(line.splitlines()) <= 1 and "\x1b" not in line


@given(st.text(st.characters(categories=("L", "N", "P", "S", "Zs", "M"))))
def test_text_without_control_characters_stays(text):
    assert escape(text) == text


def test_what_is_written_out():
    assert escape("\x1b[2J\x07\x9b\r\x00") == r"\x1b[2J\x07\x9b\x0d\x00"
    assert escape("a\u202eb\u2066c\u2028") == r"a\u202eb\u2066c\u2028"
    assert escape("\ud800 a\tb\n") == "\\ud800 a\tb\n"
    assert escape_line("a\nb\tc") == r"a\nb\tc"
