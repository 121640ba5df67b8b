"""`--help`: what a verb takes, on one screen; the rest on request. Imports no jax.

What an option means is the comment of its field: beside it, or in the lines right above
it, and of that field alone.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import shutil
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from uoe_jax.cli.fields import declared, option_fields, positional
from uoe_jax.config import ExperimentConfig
from uoe_jax.errors import ConfigError, nearest
from uoe_jax.fields import Known

# Of an experiment's two hundred options, those that most people change.
COMMON = frozenset(
    f"--{name}"
    for name in (
        "model.d-model",
        "model.d-ff",
        "model.num-layers",
        "model.num-heads",
        "model.attention",
        "model.mlp",
        "model.union.num-experts",
        "model.union.top-k",
        "data.path",
        "data.tokenizer",
        "data.seq-len",
        "data.batch-size",
        "optim.learning-rate",
        "mesh.tensor",
        "train.steps",
        "train.max-seconds",
        "train.eval-every",
        "train.save-every",
        "train.seed",
    )
)
# Taken by every verb, before its own options are looked at.
EVERYWHERE = (
    ("--devices KIND[:N]", "compute on cpu, gpu or tpu; cpu:8 makes eight of a CPU"),
    ("--no-compile-cache", "compile anew; compiled programs are kept otherwise"),
    ("--debug", "show the traceback of an error"),
)
_NAMES = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
_WORDS = ("-h", "--help", "--help-all")


class Option(NamedTuple):
    """An option as it is typed, what it takes, what it means and its default."""

    name: str
    takes: str
    text: str
    default: str


def asks_for_help(args: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return any(word in args for word in _WORDS)


def print_help(
    options: type, verb: str, args: Sequence[str], default: Any, first: str | None
) -> None:
    """Print a verb's help: common options, all of them, or a group's.

    `first` is what stands before the options; None: what the options say. Raises
    ConfigError for a group that isn't there.
    """
    found = list(list_options(options, default))
    place = next(i for i, arg in enumerate(args) if arg in _WORDS)
    topic = args[place + 1] if place + 1 < len(args) else ""
    if topic and not topic.startswith("-") or topic.startswith("--"):
        asked = f"--{topic.lstrip('-').replace('_', '-').rstrip('.')}"
        plain = lambda option: option.name.replace("[no-]", "")
        shown = [o for o in found if f"{plain(o)}.".startswith(f"{asked}.")]
        if not shown:
            known = {g for o in found for g in _groups(o.name)}
            raise ConfigError(
                f"uoe {verb} has no options {topic!r}; {nearest(topic, known)}"
            )
        print(_lines(shown))
        return
    whole = "--help-all" in args
    own = [o for o in found if "." not in o.name]
    common = [o for o in found if o not in own and (whole or o.name in COMMON)]
    print(f"usage: uoe {verb} {_first(options, first)}[OPTIONS]\n")
    print(_about(options))
    for shown in (own, common):
        if shown:
            print("\n" + _lines(shown))
    print("\n" + _lines([Option(n, "", text, "") for n, text in EVERYWHERE]))
    if len(own + common) < len(found):
        print("\n" + _rest(found, own + common, verb))


def list_options(options: type, default: Any = None) -> Iterator[Option]:
    """Yield a dataclass's options, those of its parts too, but not positional ones."""
    for field in option_fields(options):
        if positional(field.rules):
            continue
        value = _value(options, default, field.path)
        name = field.option
        if field.off is not None:
            name = field.off.replace("no-", "[no-]", 1)
        text = field_texts(field.owner).get(field.name, "")
        spec = next((r for r in field.rules if hasattr(r, "str_from_instance")), None)
        if spec is None:
            yield Option(name, _takes(field.hint, field.rules), text, _said(value))
        else:  # typed in words of its own
            said = " ".join(spec.str_from_instance(value))
            yield Option(name, spec.metavar, text, said)


def _value(options: type, default: Any, path: Sequence[str]) -> Any:
    """Return a field's value in `default`; without one, what the dataclass says."""
    for name in path:
        own = typing.cast(type, type(default) if default is not None else options)
        default = getattr(default, name, _default(own, name))
        options = typing.cast(type, declared(own)[name][0])
    return default


def _default(cls: type, name: str) -> Any:
    field = next(f for f in dataclasses.fields(cls) if f.name == name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _first(options: type, first: str | None) -> str:
    """Return what comes before the options: "PRESET ", "RUN ", "" ..."""
    if first is not None:
        return f"{first} "
    words = [] if ExperimentConfig not in _types(options) else ["PRESET"]
    for name, (_, rules, _) in declared(options).items():
        if positional(rules):
            named = [getattr(rule, "metavar", None) for rule in rules]
            word = next((word for word in named if word), name.upper())
            words.append(word if _required(options, name) else f"[{word}]")
    return "".join(f"{word} " for word in words)


def _types(options: type) -> list[Any]:
    return [hint for hint, _, _ in declared(options).values()]


def _required(cls: type, name: str) -> bool:
    field = next(f for f in dataclasses.fields(cls) if f.name == name)
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _takes(hint: Any, rules: Sequence[Any] = ()) -> str:
    """Return what an option takes: INT, {a,b}, INT ..., nothing for a flag."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if tables := [rule.table for rule in rules if isinstance(rule, Known)]:
        return "{" + ",".join(tables[0]) + "}"
    if origin is typing.Annotated:
        return _takes(args[0], args[1:])
    if origin is typing.Literal:
        return "{" + ",".join(map(str, args)) + "}"
    if origin is tuple:
        return f"{_takes(args[0])} ..."
    if origin in (types.UnionType, typing.Union):
        return "|".join(_takes(a) for a in args if a is not type(None))
    return "" if hint is bool else _NAMES.get(hint, "VALUE")


def _said(value: Any) -> str:
    if value is None or value is False or value == () or value == "":
        return ""
    if value is True:
        return "on"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


@functools.cache
def field_texts(cls: type) -> Mapping[str, str]:
    """Return what the comments of a dataclass say of its fields, by name."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            found |= _comments(typing.cast(type, base))
    return found


def _comments(cls: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(cls))
    alone: dict[int, str] = {}  # lines that are comments, and comments beside code
    beside: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.removeprefix("#").strip()
            if not text.startswith(("fmt:", "type:", "pyrefly:")):
                before = token.line[: token.start[1]].strip()
                (beside if before else alone)[token.start[0]] = text
    (body,) = (n.body for n in ast.parse(source).body if isinstance(n, ast.ClassDef))
    found = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            last = node.end_lineno or node.lineno
            said = [alone[i] for i in range(first, node.lineno)]
            said += [beside[i] for i in range(node.lineno, last + 1) if i in beside]
            found[node.target.id] = " ".join(said)
    return found


def _about(options: type) -> str:
    return inspect.cleandoc(options.__doc__ or "")


def _groups(name: str) -> Iterator[str]:
    """Yield the groups an option is in: model, model.union."""
    parts = name.removeprefix("--").replace("[no-]", "").split(".")
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])


def _lines(options: Sequence[Option]) -> str:
    """Return options beside what they mean, as wide as the terminal."""
    width = min(shutil.get_terminal_size().columns, 110)
    heads = [f"  {o.name} {o.takes}".rstrip() for o in options]
    column = min(max(map(len, heads), default=0) + 2, 33, max(width // 2, 20))
    lines = []
    for option, head in zip(options, heads, strict=True):
        text = option.text.replace("None: ", "not given: ")
        if option.default:
            text = f"{text} [{option.default}]".strip()
        wrapped = textwrap.wrap(text, max(width - column, 20)) or [""]
        if len(head) + 2 > column:
            lines.append(head)
        else:
            lines.append(f"{head:<{column}}{wrapped.pop(0)}".rstrip())
        lines += [" " * column + line for line in wrapped if line]
    return "\n".join(lines)


def _rest(found: Sequence[Option], common: Sequence[Option], verb: str) -> str:
    """Return how many options of which groups aren't shown, and how to see them."""
    names = {option.name for option in common}
    counts: dict[str, int] = {}
    for option in found:
        group = option.name.removeprefix("--").rpartition(".")[0]
        if option.name not in names and group:
            counts[group] = counts.get(group, 0) + 1
    listed = ", ".join(f"{group} ({count})" for group, count in counts.items())
    text = (
        f"{sum(counts.values())} more in groups: {listed}. `uoe help {verb} GROUP` "
        f"shows one, `uoe {verb} --help-all` shows all."
    )
    return "\n".join(textwrap.wrap(text, min(shutil.get_terminal_size().columns, 100)))
