"""Foreign text made fit for a terminal: what would steer it is shown instead."""

from __future__ import annotations

import re

# Control characters (C0 but for newline and tab, DEL, C1), marks that break a line or
# turn its direction, and halves of surrogate pairs, which have no UTF-8.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f"
    "\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


# What texts name by where it lies on this machine, and what it is called there.
_NAMES: dict[str, str] = {}


def show_as(text: str, name: str) -> None:
    """Let messages say `name` where they would say `text`, such as a copy's folder."""
    _NAMES[text] = name


def escape(text: str) -> str:
    r"""Return a text whose control characters are written out, as `\x1b`.

    Newlines and tabs stay. Text without such characters comes back as it is, so a
    backslash in it may stand for itself.
    """
    return _STEERING.sub(lambda found: _written(ord(found[0])), text)


def escape_line(text: str) -> str:
    r"""Return a name or message as one line of characters that can be seen.

    Line ends are written out too, and what has no picture, such as a zero-width joiner:
    a name can't forge a second line, or look like another. What `show_as` was told of
    goes by its name.
    """
    for told, name in _NAMES.items():
        text = text.replace(told, name)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _written(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
