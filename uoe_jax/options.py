"""How a config's field is typed at the command line where its type doesn't say.

Metadata of `Annotated`, beside a field's bounds, that tyro reads. Imports no jax.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tyro.constructors import PrimitiveConstructorSpec

from uoe_jax.errors import ConfigError


def words(table: Mapping[str, Any]) -> PrimitiveConstructorSpec:
    """Return that a field is one word of `table`, which stands for its value."""
    named = lambda value: next(word for word, v in table.items() if v == value)
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(table) + "}",
        instance_from_str=lambda args: table[args[0]],
        is_instance=lambda value: value in table.values(),
        str_from_instance=lambda value: [named(value)],
        choices=tuple(table),
    )


def pairs(form: str, example: str) -> PrimitiveConstructorSpec:
    """Return that a dict of whole numbers is typed as words of KEY=NUMBER.

    `form` names the two and `example` is one, for the help and for refusals.
    """

    def read(args: list[str]) -> dict[str, int]:
        found = {}
        for word in args:
            key, _, number = word.rpartition("=")
            if not key or not number.isdecimal():
                name = form.lower().replace("=", " ")
                raise ConfigError(f"{name} is {word!r}; write {form}, as in {example}")
            found[key] = int(number)
        return found

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"{form} ...",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{k}={n}" for k, n in value.items()],
    )
