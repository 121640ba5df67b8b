"""What `uoe runs` compares: the index, and the run, preset or file that is named."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uoe_jax.cli.parse import parse, take_preset
from uoe_jax.errors import ConfigError, nearest
from uoe_jax.escape import escape_line
from uoe_jax.files import write_atomically
from uoe_jax.presets import PRESETS, get_preset
from uoe_jax.runs.find import RUNS, find_run, is_run
from uoe_jax.runs.index import INDEX, RunIndex, open_index
from uoe_jax.runs.read import BROKEN, RunRecord, config_record, read_run
from uoe_jax.validation import read_config, validate

EXPERIMENTS = Path("experiments")
_BROKEN = 20  # broken runs that are told one by one


def take_plan(options: Any, args: list[str], verb: str) -> tuple[Any, RunRecord]:
    """Return a sub-verb's options, and what the first argument and options describe."""
    named = bool(args) and not args[0].startswith("-")
    name = args[0] if named else ""
    default = None
    if named and name not in PRESETS and not name.startswith("sized-"):
        default = _read_file(name) or (read_config(find_run(name)) if is_run(name)
                                       else None)  # fmt: skip
        if default is None:
            known = [*PRESETS, *(str(p.parent) for p in RUNS.glob("*/config.json"))]
            raise ConfigError(f"no preset and no run {name!r}; {nearest(name, known)}")
    if isinstance(default, RunRecord):
        preset, rest = get_preset("tiny"), args[1:]
    elif default is not None:
        preset, rest = default, args[1:]
    else:
        preset, rest = take_preset(args, f"runs {verb}")
    found = parse(
        options,
        rest,
        f"runs {verb}",
        default=options(config=preset),
        first="RUN|PRESET",
    )
    if isinstance(default, RunRecord):
        if found.config != preset:
            raise ConfigError(f"{name} is a result; give options with a preset or run")
        return found, default
    if default is not None and found.config == preset:
        return found, _whole(read_run(find_run(name)), name)
    validate(found.config)
    return found, config_record(found.config, name or "tiny")


def _read_file(name: str) -> RunRecord | None:
    """Return the record of a result's file or of foreign JSON, if it is a file."""
    from uoe_jax.runs.foreign import read_foreign

    path, _, line = name.rpartition(":")
    file = Path(path) if line.isdigit() and path else Path(name)
    if not file.is_file():
        return None
    found = read_run(file) if file.suffix == ".json" else None
    if found is None or found.status == BROKEN:
        each = {record.path: record for record in read_foreign(file)}
        found = each.get(name) or (
            next(iter(each.values())) if len(each) == 1 else None
        )
        if found is None:
            raise ConfigError(f"{name} has {len(each)} objects; give {file}:LINE")
    return _whole(found, name)


def _whole(record: RunRecord | None, name: str) -> RunRecord:
    if record is None or record.status == BROKEN:
        problem = record.problem if record else "it has no config"
        raise ConfigError(f"{name} can't be compared: {problem}")
    return record


def find_record(name: str, index: RunIndex) -> RunRecord:
    """Return the record of a run, a preset, a file, or a name of the index."""
    if (known := index.record(name)) is not None:
        return known
    if (found := _read_file(name)) is not None:
        return found
    if is_run(name):
        return _whole(read_run(find_run(name)), name)
    if name in PRESETS or name.startswith("sized-"):
        return config_record(get_preset(name), name)
    same = [r for r in index.records if r.name == name]
    if len(same) == 1:
        return same[0]
    known_names = [*PRESETS, *(r.path for r in index.records)]
    raise ConfigError(f"no run and no preset {name!r}; {_few(name, known_names)}")


def _few(name: str, known: Sequence[str]) -> str:
    said = nearest(name, known)
    return said if len(said) < 300 else "uoe runs lists the runs"


def open_runs(folders: list[Path]) -> RunIndex:
    """Return the index of some folders, or of runs/ and experiments/."""
    if folders:
        return open_index(folders)
    roots = [folder for folder in (RUNS, EXPERIMENTS) if folder.is_dir()]
    if not roots:
        raise ConfigError(
            "there is no runs/ and no experiments/ here; train one first: "
            "uoe train tiny, or name folders: uoe runs FOLDER"
        )
    return open_index(roots, RUNS / INDEX)


def open_foreign(folder: Path) -> RunIndex:
    """Return the index of a folder that `uoe runs index` went through."""
    file = folder / INDEX if folder.is_dir() else folder
    if not file.is_file():
        raise ConfigError(f"{folder} has no index; make it: uoe runs index {folder}")
    return RunIndex.load(file)


def tell_broken(broken: list[RunRecord]) -> None:
    """Say which runs can't be read, one line each, on standard error."""
    for record in broken[:_BROKEN]:
        print(escape_line(f"broken: {record.path}: {record.problem}"), file=sys.stderr)
    if len(broken) > _BROKEN:
        print(f"broken: and {len(broken) - _BROKEN:,} more", file=sys.stderr)


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; ConfigError where it can't be written."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise ConfigError(f"{path} can't be written ({error.strerror})") from None
