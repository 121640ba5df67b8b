"""Arguments to dataclasses with tyro; every mistake is one line that names the fix."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import io
import math
import os
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path

import tyro

from uoe_jax.cli.fields import (
    OptionField,
    metavar,
    option_fields,
    option_names,
    positional,
)
from uoe_jax.cli.help import asks_for_help, print_help
from uoe_jax.config import DataConfig, ExperimentConfig, from_json
from uoe_jax.errors import ConfigError, nearest
from uoe_jax.fields import out_of_bounds
from uoe_jax.files import check_path
from uoe_jax.presets import PRESETS, get_preset
from uoe_jax.rules import Rules, read_rules
from uoe_jax.stores.objects import address_of

# Fields of text that name files or folders; those of type Path do anyway.
_PATHS = (
    "data",
    "path",
    "data_dir",
    "cache_dir",
    "load",
    "tokenizer",
    "chat_template",
    "gemm",
    "calibrate",
)
# What may lie in a store beside the runs that verbs take: by class and field.
_STORED = {
    ("TrainOptions", "run_dir"),
    ("TrainOptions", "init_from"),
    ("ImportOptions", "run_dir"),
    ("DecomposeOptions", "out"),
    ("CompressOptions", "out"),
    ("AdaptOptions", "out"),
    ("DataConfig", "cache_dir"),
}
_RUNS = ("run", "runs", "target")  # names of runs too, which `find_run` looks for
_UNNAMED = (*_RUNS, "file")  # typed without an option's name

# The field's other words for options, and what they are here, where a verb has it.
USUAL: dict[str, tuple[str, ...]] = {
    "lr": ("--optim.learning-rate", "--learning-rate"),
    "learning-rate": ("--optim.learning-rate", "--learning-rate"),
    "bs": ("--data.batch-size", "--batch-size", "--batch"),
    "batch": ("--data.batch-size", "--batch-size"),
    "batch-size": ("--data.batch-size", "--batch-size"),
    "micro-batch-size": ("--train.accumulate",),
    "grad-accum": ("--train.accumulate",),
    "gradient-accumulation-steps": ("--train.accumulate",),
    "epochs": ("--train.steps", "--steps", "--iters"),
    "num-epochs": ("--train.steps", "--steps", "--iters"),
    "steps": ("--train.steps", "--steps"),
    "max-steps": ("--train.steps", "--steps"),
    "num-steps": ("--train.steps", "--steps"),
    "iterations": ("--train.steps", "--steps", "--iters"),
    "layers": ("--model.num-layers",),
    "depth": ("--model.num-layers",),
    "n-layer": ("--model.num-layers",),
    "heads": ("--model.num-heads",),
    "n-head": ("--model.num-heads",),
    "kv-heads": ("--model.num-kv-heads",),
    "hidden-size": ("--model.d-model",),
    "n-embd": ("--model.d-model",),
    "dim": ("--model.d-model",),
    "width": ("--model.d-model",),
    "experts": ("--experts", "--model.union.num-experts", "--model.moe.num-experts"),
    "num-experts": (
        "--experts",
        "--model.union.num-experts",
        "--model.moe.num-experts",
    ),
    "top-k": ("--top-k", "--model.union.top-k", "--model.moe.top-k"),
    "context-length": ("--data.seq-len", "--seq-len"),
    "ctx": ("--data.seq-len", "--seq-len"),
    "block-size": ("--data.seq-len", "--seq-len", "--model.moba.block-size"),
    "seq-len": ("--data.seq-len", "--seq-len"),
    "dataset": ("--data.path", "--data"),
    "path": ("--data.path", "--data"),
    "warmup": ("--optim.warmup-steps",),
    "wd": ("--optim.weight-decay",),
    "grad-clip": ("--optim.clip-norm",),
    "precision": ("--model.compute-dtype",),
    "dtype": ("--model.compute-dtype",),
    "seed": ("--train.seed", "--seed"),
    "out": ("--run-dir", "--out"),
    "to": ("--run-dir", "--out"),
    "out-dir": ("--run-dir", "--out"),
    "output": ("--run-dir", "--out"),
    "output-dir": ("--run-dir", "--out"),
    "device": ("--devices",),
    "gpus": ("--devices",),
    "num-gpus": ("--devices",),
    "cpu": ("--devices",),
    "max-tokens": ("--max-new-tokens",),
    "temp": ("--temperature",),
    "verbose": ("--debug",),
    "tp": ("--mesh.tensor",),
}
# What is asked for like an option and is a verb.
_VERBS = {"list": "uoe presets", "presets": "uoe presets", "version": "uoe --version"}

_TRUTHS = ("true", "false", "yes", "no", "on", "off", "1", "0")

_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _path_rule(
    found: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Read a path as tyro does; but "" stays blank, to be refused by its option.

    `Path("")` would be the working folder, and of `gs:///run` one slash would stay.
    """
    if found.type is not Path:
        return None

    def read(args: list[str]) -> Path:
        address_of(args[0])  # raises StoreError where that names no bucket
        return Path(args[0] or " ")

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


@_REGISTRY.primitive_rule
def _rules_rule(
    found: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Read layout rules from a file."""
    if found.type is not Rules:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FILE",
        instance_from_str=lambda args: read_rules(args[0]),
        is_instance=lambda value: isinstance(value, Rules),
        str_from_instance=lambda value: ["; ".join(value) or "none"],
    )


# The experiment's own options carry no prefix: --model.d-model, not --config.model...
Experiment = typing.Annotated[ExperimentConfig, tyro.conf.arg(name="")]


def parse[Options](
    options: type[Options],
    args: Sequence[str],
    verb: str,
    *,
    default: Options | None = None,
    first: str | None = None,
) -> Options:
    """Return `options` filled from the command line.

    `first` is what the usage line has before the options, if it isn't PRESET or what
    is positional.

    Raises:
        ConfigError: an unknown option, or a value that is missing or of the wrong type.
        SystemExit: after printing help.
    """
    if asks_for_help(args):
        print_help(options, verb, args, default, first)
        raise SystemExit(0)
    _check_names(args, options, verb)
    if default is not None:
        default = _one_source(default, args)
    said = io.StringIO()
    # tyro draws a box over many lines; it is caught and flattened below.
    found = None
    with contextlib.redirect_stderr(said), _wide():
        try:
            found = tyro.cli(
                options,
                args=list(args),
                prog=f"uoe {verb}",
                default=tyro.MISSING_NONPROP if default is None else default,
                registry=_REGISTRY,
            )
        except SystemExit:
            pass
        except ConfigError as error:  # a config's own refusal
            raise ConfigError(_as_options(str(error), options)) from None
    if found is None:
        text = _as_options(flatten(said.getvalue()), options)
        raise ConfigError(f"{text}; see uoe {verb} --help")
    _check_paths(found)
    _check_numbers(found)
    return found


def _one_source[Options](default: Options, args: Sequence[str]) -> Options:
    """Return defaults without a source of data in whose place another was typed.

    A run's mixture would stand beside a path that is typed, or its path beside a
    mixture: nobody means both.
    """
    typed = typed_data(args)
    mix = "mix" in typed
    if mix == bool({"path", "source"} & typed):
        return default
    change: dict = {"path": None, "source": "auto"} if mix else {"mix": None}
    new: dict[str, typing.Any] = {}
    for field in dataclasses.fields(typing.cast(typing.Any, default)):
        value = getattr(default, field.name)
        if isinstance(value, DataConfig):
            new[field.name] = dataclasses.replace(value, **change)
        elif isinstance(value, ExperimentConfig):
            data = dataclasses.replace(value.data, **change)
            new[field.name] = dataclasses.replace(value, data=data)
    return dataclasses.replace(typing.cast(typing.Any, default), **new)


@contextlib.contextmanager
def _wide() -> Iterator[None]:
    """Let tyro write without breaking lines: a long path would get blanks in it."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "20000"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = before


def _as_options(text: str, options: type) -> str:
    """Return a config's refusal with its field named as the option that was typed."""
    found = re.match(r"(?:Error parsing \S+: )?(?:([A-Z]\w*)\.)?(\w+) is ", text)
    if found is None:
        return text
    for field in option_fields(options):
        named = (found[1] or options.__name__, found[2])
        if named == (field.owner.__name__, field.name):
            return f"{_typed_as(field)} is {text[found.end() :]}"
    return text


def _typed_as(field: OptionField) -> str:
    """Return how a field is typed: `--run-dir`, or RUN for what carries no name."""
    if field.name in _UNNAMED:
        return field.name.removesuffix("s").upper()
    return field.option


def _check_numbers(found: typing.Any) -> None:
    """Raise ConfigError for numbers of a verb's own options that can't be.

    Those of a part are left to `validate`, which knows how they belong together.
    """
    problems = []
    for field in option_fields(type(found)):
        if len(field.path) > 1:
            continue
        value = getattr(found, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{field.option} is {value}; it must be a finite number")
        else:
            problems.extend(out_of_bounds(field.annotation, value, field.option))
    if problems:
        raise ConfigError("; ".join(problems))


def _check_paths(options: typing.Any) -> None:
    """Raise ConfigError for "" and addresses such as gs://... where paths belong.

    Runs may lie in a store.
    """
    for field in option_fields(type(options)):
        value = functools.reduce(getattr, field.path, options)
        runs = field.name in _RUNS
        stored = runs or (field.owner.__name__, field.name) in _STORED
        for item in value if isinstance(value, tuple) else (value,):
            named = isinstance(item, str) and field.name in _PATHS
            if isinstance(item, Path) or named or (runs and item):
                if not stored or address_of(item) is None:
                    check_path(item, _typed_as(field))


def take_preset(
    args: Sequence[str], verb: str, default: str | None = None
) -> tuple[ExperimentConfig, list[str]]:
    """Split `PRESET [options]` into the preset's config and the rest.

    `--config FILE` stands for a preset: JSON, as `uoe config PRESET` prints it. Help
    without a preset is shown for `tiny`. Raises ConfigError without either where there
    is no default.
    """
    file, rest = _take_option(args, "--config")
    if file is not None:
        if rest and not rest[0].startswith("-"):
            raise ConfigError(
                f"{rest[0]} with --config {file}; give a preset or a file, not both"
            )
        return _read_file(Path(file)), rest
    if args and not args[0].startswith("-"):
        return get_preset(args[0]), list(args[1:])
    if default or asks_for_help(args):
        return get_preset(default or "tiny"), list(args)
    raise ConfigError(
        f"uoe {verb} takes a preset first: uoe {verb} PRESET; presets: "
        + ", ".join(PRESETS)
    )


def _take_option(args: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Return an option's value, None without it, and the other arguments."""
    for place, arg in enumerate(args):
        if arg == name:
            if place + 1 == len(args):
                raise ConfigError(f"{name} has no value; give a file: {name} FILE")
            return args[place + 1], [*args[:place], *args[place + 2 :]]
        if arg.startswith(f"{name}="):
            value = arg.removeprefix(f"{name}=")
            return value, [*args[:place], *args[place + 1 :]]
    return None, list(args)


def _read_file(path: Path) -> ExperimentConfig:
    check_path(path, "--config")
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} isn't text ({error.reason})") from None
    except OSError as error:
        raise ConfigError(
            f"--config {path} can't be read ({error.strerror}); uoe config PRESET "
            "writes one"
        ) from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def check_typed(args: Sequence[str], data: DataConfig, kind: str) -> None:
    """Raise ConfigError for a typed data option that the data's source would ignore."""
    from uoe_jax.data.options import check_used
    from uoe_jax.data.source import resolve

    typed = typed_data(args)
    if not typed:  # then the data needn't be there
        return
    check_used(data, resolve(data, kind), kind, typed)


def typed_data(args: Sequence[str]) -> set[str]:
    """Return the fields of the data's options that were typed."""
    names = {arg.split("=", 1)[0] for arg in args if arg.startswith("--data.")}
    typed = {n.removeprefix("--data.").replace("-", "_") for n in names}
    return {n.removeprefix("no_") for n in typed}


def _check_names(args: Sequence[str], options: type, verb: str) -> None:
    known = set(option_names(options))
    unnamed = {
        field.option: metavar(field)
        for field in option_fields(options)
        if positional(field.rules)
    }
    for place, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        name = name.replace("_", "-")
        on, off = _flag(name)
        if name.startswith("-") and {on, off} <= known:
            after = args[place + 1] if place + 1 < len(args) else ""
            if equals or after.lower() in _TRUTHS:
                raise ConfigError(
                    f"{name} takes no value but has {value if equals else after!r}; "
                    f"write {on} or {off}"
                )
        if not name.startswith("--") or len(name) == 2 or " " in name or name in known:
            continue
        leaf = name.lstrip("-").rsplit(".", 1)[-1]
        here = {*known, "--devices", "--debug"}  # these two every verb takes
        usual = [option for option in USUAL.get(leaf, ()) if option in here]
        same = sorted(k for k in known if k.lstrip("-").rsplit(".", 1)[-1] == leaf)
        bare = next((u for u in (name, *USUAL.get(leaf, ())) if u in unnamed), None)
        if bare is not None:
            fix = f"{unnamed[bare]} is given without a name: see uoe {verb} --help"
        elif leaf in _VERBS:
            fix = f"{_VERBS[leaf]} does that"
        elif usual:
            fix = "did you mean " + " or ".join(usual[:3]) + "?"
        elif same:
            fix = "did you mean " + " or ".join(same[:3]) + "?"
        elif difflib.get_close_matches(name, known, cutoff=0.5):
            fix = nearest(name, known)
        else:
            fix = f"uoe {verb} --help lists the options"
        raise ConfigError(f"uoe {verb} has no option {name}; {fix}")


def _flag(name: str) -> tuple[str, str]:
    """Return how a flag is switched on and off: `--a.b` and `--a.no-b` of either."""
    group, dot, leaf = name.removeprefix("--").rpartition(".")
    leaf = leaf.removeprefix("no-")
    return f"--{group}{dot}{leaf}", f"--{group}{dot}no-{leaf}"


def flatten(box: str) -> str:
    """Return the message inside tyro's box as one line, types in plain words.

    Where the terminal has no line characters, the box is a title over a rule.
    """
    lines = [re.sub(r"[│╭╮╰╯]", " ", line).strip() for line in box.splitlines()]
    blocks = re.split(r"\n[─-]{8,}", "\n".join(lines))
    if "│" in box:
        text = blocks[0].partition("\n")[2]
    else:
        text = blocks[min(1, len(blocks) - 1)]
    text = " ".join(text.split()).removesuffix(".")
    # What a dataclass refuses says enough without the dataclass's name.
    text = re.sub(r"^Error parsing [A-Z]\w*: ", "", text)
    for kind, words in (("int", "a whole number"), ("float", "a number")):
        found = re.search(rf"parsing (\S+): .*\b{kind}\b.*: '?(.*?)'?$", text)
        if found:
            return f"{found[1]} is {found[2]!r}; it takes {words}"
    found = re.search(r"choice (.*) for argument '(.*)'.*one of \((.*?),?\)", text)
    if found:
        return f"{found[2]} is {found[1]}; choose from {found[3]}"
    return text
