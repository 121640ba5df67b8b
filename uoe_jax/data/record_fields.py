"""What a record's fields say: a text, a prompt and its completion, or messages."""

from __future__ import annotations

from typing import Any

from uoe_jax.data.chat import Part
from uoe_jax.errors import DataError, nearest

# What a record may hold instead of a text.
PROMPT, COMPLETION, MESSAGES = "prompt", "completion", "messages"


class BadRecordError(DataError):
    """A record without a text, which may be skipped."""


def find_messages(record: Any, key: str) -> Any:
    """Return a record's conversation: its field `key` or `messages`; None without."""
    if not isinstance(record, dict):
        return None
    given = record.get(key)
    if isinstance(given, list) and given and isinstance(given[0], dict):
        return given
    return None if _has(record, key) else record.get(MESSAGES)


def find_completion(record: Any, key: str, where: str) -> tuple[Part, ...]:
    """Return the prompt and completion of a record without a text; none without.

    Raises BadRecordError where they are no texts.
    """
    if not isinstance(record, dict) or _has(record, key):
        return ()
    if not {PROMPT, COMPLETION} <= record.keys():
        return ()
    prompt = find_text(record, PROMPT, where)
    return (Part(prompt, False), Part(find_text(record, COMPLETION, where), True))


def text_columns(key: str, known: list[str], *, answers: bool) -> list[str] | None:
    """Return the columns of a table that hold its texts; None without any.

    `answers` takes messages, or a prompt with its completion, for a text too.
    """
    instead = [[MESSAGES], [PROMPT, COMPLETION]] if answers else []
    for names in ([key], [key.split(".")[0]], *instead):
        if set(names) <= set(known):
            return names
    return None


def _has(record: dict[str, Any], key: str) -> bool:
    return key in record or key.split(".")[0] in record


def find_text(record: Any, key: str, where: str) -> str:
    """Return a record's field; `a.b` is field b of field a, `a.0` the first of a list.

    Raises DataError where it is missing or isn't text.
    """
    value, path = record, []
    if not isinstance(record, dict):
        if isinstance(record, str):
            return record
        raise BadRecordError(f"{where} holds {type_name(record)}, not an object")
    names = [key] if key in record else key.split(".")
    for name in names:
        known = (
            [str(i) for i in range(len(value))] if isinstance(value, list) else value
        )
        if not isinstance(value, (dict, list)) or name not in known:
            inside = f" in field {'.'.join(path)!r}" if path else ""
            hint = nearest(name, known) if isinstance(value, dict) and known else ""
            raise BadRecordError(
                f"{where} has no field {name!r}{inside}"
                + (f"; {hint}" if hint else "")
                + " (data.text_key)"
            )
        value = value[int(name)] if isinstance(value, list) else value[name]
        path.append(name)
    if not isinstance(value, str):
        raise BadRecordError(
            f"{where} field {key!r} holds {type_name(value)}; it must be text"
        )
    return value


def type_name(value: Any) -> str:
    """Return what a value of JSON is called."""
    return "null" if value is None else type(value).__name__
