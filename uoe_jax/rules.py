"""Layout rules: along which of their axes weights are split. Imports no jax.

A rule is a pattern of parameter names and, for mesh axes, the letter of a weight's axis
(`weights.py`): in a file `{"*.attention.wq": {"fsdp": "h"}, "*.w_up": {"fsdp": null}}`,
in a config as texts such as "*.attention.wq fsdp=h". No letter: the weight stays whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from uoe_jax.errors import ConfigError, DataError, nearest, shown
from uoe_jax.files import local_path, read_json

SPLITS = ("fsdp", "tensor")  # the mesh axes that split weights
_OTHERS = ("data", "sequence")
_FORM = 'write {"*.attention.wq": {"fsdp": "h"}}'


class SplitRule(NamedTuple):
    """Parameters whose names match `pattern`, and the letter of each mesh axis."""

    pattern: str
    letters: dict[str, str]  # "": whole

    def __str__(self) -> str:
        words = [f"{axis}={letter}" for axis, letter in self.letters.items()]
        return " ".join([self.pattern, *words])


class Rules(tuple):
    """Layout rules as texts, for `LayoutConfig.rules`; see `parsed`."""

    __slots__ = ()

    @classmethod
    def checked(cls, value: Any, where: str = "layout.rules") -> Rules:
        """Return rules from texts or from the mapping that a file holds.

        Raises ConfigError for anything else, naming the rule.
        """
        if isinstance(value, Mapping):
            return cls(str(rule) for rule in _from_mapping(value, where))
        if not isinstance(value, (tuple, list)):
            raise ConfigError(f"{where} is {shown(value)}; {_FORM}")
        return cls(str(_from_text(item, where)) for item in value)

    def parsed(self) -> Iterator[SplitRule]:
        """Yield each rule with its parts apart."""
        for text in self:
            yield _from_text(text, "layout.rules")


NO_RULES = Rules()


def read_rules(path: str | Path) -> Rules:
    """Return the rules of a JSON file; raise ConfigError for what isn't one."""
    file = local_path(path, "layout.rules")
    try:
        content = read_json(file)
    except (OSError, DataError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{file} can't be read as JSON ({reason}); {_FORM}") from None
    if not isinstance(content, Mapping) or not content:
        raise ConfigError(f"{file} holds {shown(content)}, no layout rules; {_FORM}")
    return Rules.checked(content, str(file))


def _from_mapping(content: Mapping[str, Any], where: str) -> Iterator[SplitRule]:
    for pattern, letters in content.items():
        if not isinstance(letters, Mapping) or not letters:
            raise ConfigError(
                f"{where}: the rule {shown(pattern)} is {shown(letters)}; {_FORM}"
            )
        yield _checked(pattern, dict(letters), where)


def _from_text(text: Any, where: str) -> SplitRule:
    if not isinstance(text, str):
        raise ConfigError(f"{where} holds {shown(text)}; {_FORM}")
    pattern, *words = text.split() or [""]
    letters = {}
    for word in words:
        axis, equals, letter = word.partition("=")
        if not equals or axis in letters:
            raise ConfigError(
                f"{where}: the rule {shown(text)} has {word!r}; name each mesh axis "
                "once, such as fsdp=h"
            )
        letters[axis] = letter
    if not words:
        raise ConfigError(
            f"{where}: the rule {shown(text)} names no mesh axis; {_FORM}"
        )
    return _checked(pattern, letters, where)


def _checked(pattern: Any, letters: dict[Any, Any], where: str) -> SplitRule:
    if not isinstance(pattern, str) or not re.fullmatch(r"[\w.*?\[\]-]+", pattern):
        raise ConfigError(
            f"{where}: {shown(pattern)} is no pattern of parameter names, such as "
            "*.attention.wq"
        )
    for axis, letter in letters.items():
        if axis in _OTHERS:
            raise ConfigError(
                f"{where}: the rule {pattern!r} names {axis}, which splits no weights; "
                "use fsdp"
            )
        if axis not in SPLITS:
            raise ConfigError(
                f"{where}: the rule {pattern!r} names {shown(axis)}, which is no mesh "
                f"axis; {nearest(str(axis), SPLITS)}"
            )
        if letter is not None and not (
            isinstance(letter, str) and re.fullmatch("[a-z]?", letter)
        ):
            raise ConfigError(
                f"{where}: the rule {pattern!r} has {axis} {shown(letter)}; give one "
                "letter of the weight's axes, or null"
            )
    return SplitRule(pattern, {axis: letter or "" for axis, letter in letters.items()})
