"""The options that a dataclass gives: one walk over its fields and those of its parts.

An option is named as its field, unless the annotation has another name for it: tyro's
`arg(name=...)`. A part whose name is "" gives its options without a prefix.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class OptionField(NamedTuple):
    """A field that is an option: `--a.b-c`, by which attributes, of what type."""

    option: str
    path: tuple[str, ...]  # attributes from the options down to the field
    owner: type  # the dataclass that has it
    hint: Any  # without `Annotated`
    rules: tuple[Any, ...]  # what `Annotated` adds
    annotation: Any  # both

    @property
    def name(self) -> str:
        """The field's own name."""
        return self.path[-1]

    @property
    def off(self) -> str | None:
        """How a flag is switched off: `--a.no-b-c`; None for what is no flag."""
        if self.hint is not bool:
            return None
        return re.sub(r"(^--|\.)(?=[^.]*$)", r"\1no-", self.option)


def option_fields(
    options: type, prefix: str = "--", path: tuple[str, ...] = ()
) -> Iterator[OptionField]:
    """Yield every option of a dataclass, those of its parts too, as declared."""
    for name, (hint, rules, annotation) in declared(options).items():
        typed = typed_name(name, rules)
        if dataclasses.is_dataclass(hint):
            inner = f"{prefix}{typed}." if typed else prefix
            yield from option_fields(typing.cast(type, hint), inner, (*path, name))
        elif not _fixed(rules):
            yield OptionField(
                prefix + typed, (*path, name), options, hint, rules, annotation
            )


@functools.cache
def declared(options: type) -> Mapping[str, tuple[Any, tuple[Any, ...], Any]]:
    """Return each field's type, what its annotation adds to it, and both together."""
    hints = typing.get_type_hints(options, include_extras=True)
    found = {}
    for field in dataclasses.fields(options):
        hint, rules = hints[field.name], ()
        if typing.get_origin(hint) is typing.Annotated:
            hint, *rules = typing.get_args(hint)
        found[field.name] = (hint, tuple(rules), hints[field.name])
    return found


def typed_name(name: str, rules: Sequence[Any]) -> str:
    """Return what a field is typed as: its annotation's `arg(name=...)`, or a-b."""
    named = [getattr(rule, "name", None) for rule in rules if _is_arg(rule)]
    return next((word for word in named if word is not None), name.replace("_", "-"))


def option_names(options: type) -> Iterator[str]:
    """Yield every option a dataclass gives: `--a.b-c`, and `--a.no-b-c` for flags."""
    for field in option_fields(options):
        if positional(field.rules):
            continue
        yield field.option
        if field.off is not None:
            yield field.off


def typed_options(args: Sequence[str], options: type) -> set[str]:
    """Return the options that stand on a command line: `--a.b-c`, flags as `--b-c`.

    Whatever their values: what was typed counts even where it is the default.
    """
    names = {arg.split("=", 1)[0].replace("_", "-") for arg in args}
    return {
        field.option
        for field in option_fields(options)
        if names & {field.option, field.off}
    }


def part_of(options: Any, part: type[Any], into: Any = None, **more: Any) -> Any:
    """Return `part`, or `into` that inherits it, from some options' fields of it.

    `more` are other fields of what is returned.
    """
    names = [field.name for field in dataclasses.fields(part)]
    return (into or part)(**{n: getattr(options, n) for n in names}, **more)


def positional(rules: Sequence[Any]) -> bool:
    """Whether a field is typed without an option's name."""
    return any("Positional" in repr(rule) for rule in rules)


def metavar(field: OptionField) -> str:
    """Return what a usage line calls a field's value."""
    named = (getattr(rule, "metavar", None) for rule in field.rules if _is_arg(rule))
    return next((word for word in named if word), field.name.upper())


def _is_arg(rule: Any) -> bool:
    return hasattr(rule, "metavar") and hasattr(rule, "name")


def _fixed(rules: Sequence[Any]) -> bool:
    """Whether a field keeps its default at the command line: tyro's `Fixed`."""
    return any("Fixed" in repr(rule) for rule in rules)
