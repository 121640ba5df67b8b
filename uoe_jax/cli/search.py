"""`uoe runs`: all runs in a table, what is like one, why, and what to expect."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from uoe_jax.cli.parse import Experiment, parse, take_preset
from uoe_jax.cli.paths import RUNS, find_run, is_run
from uoe_jax.errors import ConfigError, nearest
from uoe_jax.escape import escape_line
from uoe_jax.fields import Count
from uoe_jax.files import format_json, write_atomically
from uoe_jax.presets import PRESETS, get_preset
from uoe_jax.runs.index import INDEX, RunIndex, open_index
from uoe_jax.runs.read import BROKEN, RunRecord, config_record, read_run
from uoe_jax.runs.search import Difference, expect, explain, like, show_value
from uoe_jax.runs.table import select, show_column
from uoe_jax.validation import read_config, validate

EXPERIMENTS = Path("experiments")
_METRICS = Literal["loss", "bits_per_byte", "accuracy"]
_COLUMNS = ("loss", "parameters", "seconds", "steps")
_WRITTEN = 4  # differences in a line of a table
_BROKEN = 20  # broken runs that are told one by one


@dataclass(frozen=True, kw_only=True)
class RunsOptions:
    """List runs; `uoe runs like|explain|expect|index --help` for what else it does."""

    # Folders; runs/ and experiments/ if none is given.
    folders: Positional[tuple[Annotated[str, arg(metavar="FOLDER")], ...]] = ()
    sort: str = "loss"  # an outcome, `name` or a setting
    descending: bool = False  # the largest first
    where: tuple[str, ...] = ()  # such as "optim.learning_rate>=0.001" "mlp=union"
    columns: tuple[str, ...] = ()  # settings or outcomes to show beside the usual
    limit: Count | None = None  # rows; a map and a page have all
    metric: _METRICS = "loss"  # that the map shows
    page: Path | None = None  # an HTML file over these runs
    map: Path | None = None  # a PNG of these runs, by how alike they are
    json: bool = False  # one JSON object instead of a table


@dataclass(frozen=True, kw_only=True)
class LikeOptions:
    """Runs most like RUN, or like PRESET with options, and in what they differ."""

    config: Experiment
    count: Annotated[Count, arg(aliases=["-n"])] = 5  # runs to show
    index: Path | None = None  # a folder that uoe runs index went through
    json: bool = False  # one JSON object instead of a table


@dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """Settings in which A and B differ, by their share of the dissimilarity."""

    runs: Positional[tuple[Annotated[str, arg(metavar="RUN")], ...]] = ()
    index: Path | None = None  # a folder that uoe runs index went through
    json: bool = False  # one JSON object instead of a table


@dataclass(frozen=True, kw_only=True)
class ExpectOptions:
    """Loss to expect of RUN, or PRESET with options, from the runs most like it."""

    config: Experiment
    metric: _METRICS = "loss"  # the outcome to expect
    level: float = 0.8  # share of plans whose result the interval is to hold
    json: bool = False  # one JSON object instead of a table


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """Index a folder of JSON files: one object a .json file, or a line of .jsonl."""

    folder: Positional[Annotated[str, arg(metavar="FOLDER")]] = ""
    dim: int = 2048  # of the vectors: a power of two
    number: Literal["fourier", "thermometer"] = (
        "fourier"  # how a number becomes part of a vector
    )
    half: bool = False  # 2 bytes a number, not 4
    out: Path | None = None  # FOLDER/.index.npz if not given
    json: bool = False  # one JSON object instead of a table


def runs(args: list[str]) -> int:
    """List runs, or do what the first argument says."""
    verbs = {
        "like": like_run,
        "explain": explain_runs,
        "expect": expect_run,
        "index": index_folder,
    }
    if args and args[0] in verbs:
        return verbs[args[0]](args[1:])
    return list_runs(args)


def list_runs(args: list[str]) -> int:
    """Print a table of runs; write a map and a page of them."""
    options = parse(RunsOptions, args, "runs")
    for path in (options.page, options.map):
        _check_out(path)
    index = _open([Path(folder) for folder in options.folders])
    chosen = select(index.records, options.where, options.sort, options.descending)
    names = list(dict.fromkeys([*_COLUMNS, *options.columns]))
    if options.json:
        found = {
            "runs": [dataclasses.asdict(record) for record in chosen[: options.limit]],
            "broken": [dataclasses.asdict(record) for record in index.broken],
        }
        print(format_json(found, indent=2))
    else:
        _print_runs(index, chosen[: options.limit], names)
    _tell_broken(index.broken)
    if options.page or options.map:
        _write_pictures(options, index, chosen, names)
    return 0


def _print_runs(index: RunIndex, chosen: list[RunRecord], names: list[str]) -> None:
    from uoe_jax.report.table import format_table

    rows = [(r.path, *(show_column(r, name) for name in names)) for r in chosen]
    if rows:
        print(format_table(("run", *names), rows))
    of = "" if len(chosen) == len(index) else f" of {len(index):,}"
    print(f"{len(chosen):,}{of} runs")


def _write_pictures(
    options: RunsOptions, index: RunIndex, chosen: list[RunRecord], names: list[str]
) -> None:
    from uoe_jax.report.many_runs import draw_map, runs_page

    part = index.subset(chosen)
    if options.map is not None:
        pngs = draw_map(part, options.metric)
        if not pngs:
            raise ConfigError(f"a map takes 2 runs; these are {len(chosen)}")
        _write(options.map, pngs["light"])
        print(escape_line(f"map: {options.map}"))
    if options.page is not None:
        rows = [(r.path, *(show_column(r, name) for name in names)) for r in chosen]
        text = runs_page(part, ("run", *names), rows, options.metric)
        _write(options.page, text.encode())
        print(escape_line(f"page: {options.page}"))


def like_run(args: list[str]) -> int:
    """Print the runs most like a run or a plan."""
    options, record = _take_plan(LikeOptions, args, "like")
    index = _open_foreign(options.index) if options.index else _open([])
    record = index.record(record.path) or record
    found = like(index, record, options.count)
    if options.json:
        print(format_json([_match(m) for m in found], indent=2))
        return 0
    from uoe_jax.report.table import format_table

    rows = []
    for match in found:
        texts = [str(d) for d in match.differences[:_WRITTEN]]
        more = len(match.differences) - len(texts)
        said = "; ".join(texts) or "nothing"
        said += f"; and {more} more" if more else ""
        loss = show_column(match.record, "loss")
        rows.append((match.record.path, f"{match.cosine:.3f}", loss, said))
    print(escape_line(f"most like {record.path}, of {len(index):,} runs"))
    if rows:
        print(format_table(("run", "similarity", "loss", "differs in"), rows))
        print("differs in: the run's setting -> yours, what counts most first")
    return 0


def _match(match: Any) -> dict[str, Any]:
    return {
        "run": match.record.path,
        "similarity": match.cosine,
        "outcome": match.record.outcome,
        "differences": [_difference(d) for d in match.differences],
    }


def _difference(found: Difference) -> dict[str, Any]:
    from uoe_jax.runs.leaves import show_path

    return {
        "setting": show_path(found.path),
        "first": found.first,
        "second": found.second,
        "share": found.share,
    }


def explain_runs(args: list[str]) -> int:
    """Print in what two runs differ, and how they ended."""
    options = parse(ExplainOptions, args, "runs explain")
    if len(options.runs) != 2:
        raise ConfigError(
            f"uoe runs explain takes two runs but has {len(options.runs)}: "
            "uoe runs explain A B"
        )
    index = _open_foreign(options.index) if options.index else _open([])
    first, second = (_find(name, index) for name in options.runs)
    cosine, found = explain(index, first.settings, second.settings)
    ends = {
        name: (first[name], second[name])
        for name in ("loss", "bits_per_byte", "accuracy", "seconds", "parameters")
        if first[name] is not None or second[name] is not None
    }
    if options.json:
        each = [_difference(d) for d in found]
        about = {"similarity": cosine, "differences": each, "outcomes": ends}
        print(format_json(about, indent=2))
        return 0
    from uoe_jax.report.table import format_table

    print(escape_line(f"A: {first.path}\nB: {second.path}".replace("\n", "  ")))
    print(f"similarity {cosine:.3f}")
    rows = [
        (_difference(d)["setting"], show_value(d.first), show_value(d.second),
         f"{d.share:.0%}") for d in found
    ]  # fmt: skip
    if rows:
        print("\n" + format_table(("setting", "A", "B", "share"), rows))
    else:
        print("the same settings" + _seeds(first, second))
    if ends:
        rows = [
            (name, show_column(first, name), show_column(second, name), _minus(a, b))
            for name, (a, b) in ends.items()
        ]
        print("\n" + format_table(("outcome", "A", "B", "B - A"), rows))
    return 0


def _seeds(first: RunRecord, second: RunRecord) -> str:
    same = first.seed == second.seed
    return "" if same else f"; seeds {first.seed} and {second.seed}"


def _minus(a: float | None, b: float | None) -> str:
    return "-" if a is None or b is None else f"{b - a:+.4g}"


def expect_run(args: list[str]) -> int:
    """Print the loss to expect of a plan, with its interval, or why none can be."""
    options, record = _take_plan(ExpectOptions, args, "expect")
    found = expect(_open([]), record, metric=options.metric, level=options.level)
    if options.json:
        about = found._asdict()
        about["nearest"] = [[r.path, cosine] for r, cosine in found.nearest]
        print(format_json(about, indent=2))
        return 0
    if found.loss is None or found.low is None or found.high is None:
        print(escape_line(f"nothing to go by: {found.reason}"))
    else:
        print(
            f"{options.metric} {found.loss:.4f}, {found.level:.0%} of the time between "
            f"{found.low:.4f} and {found.high:.4f}"
        )
    for other, cosine in found.nearest:
        value = show_column(other, options.metric)
        print(escape_line(f"  {cosine:.3f}  {other.path}  {options.metric} {value}"))
    print(f"{found.configurations:,} configurations on the same data")
    return 0


def index_folder(args: list[str]) -> int:
    """Index a folder of JSON and write the index into it."""
    from uoe_jax.runs.foreign import read_foreign

    options = parse(IndexOptions, args, "runs index")
    if not options.folder:
        raise ConfigError("uoe runs index takes a folder: uoe runs index FOLDER")
    folder = Path(options.folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give one with JSON files")
    out = options.out or folder / INDEX
    _check_out(out)
    start = time.perf_counter()
    records = read_foreign(folder)
    index = RunIndex(records, dim=options.dim, number=options.number, half=options.half)
    try:
        size = index.save(out)
    except OSError as error:
        raise ConfigError(
            f"{out} can't be written ({error.strerror}); give --out FILE"
        ) from None
    about = {
        "objects": len(index),
        "broken": len(index.broken),
        "bytes": size,
        "seconds": time.perf_counter() - start,
        "index": str(out),
    }
    if options.json:
        print(format_json(about, indent=2))
    else:
        print(escape_line(
            f"{len(index):,} objects in {out}: {size:,} bytes, "
            f"{about['seconds']:.1f} s"
        ))  # fmt: skip
    _tell_broken(index.broken)
    return 0


def _take_plan(options: Any, args: list[str], verb: str) -> tuple[Any, RunRecord]:
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
    found = parse(options, rest, f"runs {verb}", default=options(config=preset))
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


def _find(name: str, index: RunIndex) -> RunRecord:
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


def _open(folders: list[Path]) -> RunIndex:
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


def _open_foreign(folder: Path) -> RunIndex:
    file = folder / INDEX if folder.is_dir() else folder
    if not file.is_file():
        raise ConfigError(f"{folder} has no index; make it: uoe runs index {folder}")
    return RunIndex.load(file)


def _tell_broken(broken: list[RunRecord]) -> None:
    """Say which runs can't be read, one line each, on standard error."""
    for record in broken[:_BROKEN]:
        print(escape_line(f"broken: {record.path}: {record.problem}"), file=sys.stderr)
    if len(broken) > _BROKEN:
        print(f"broken: and {len(broken) - _BROKEN:,} more", file=sys.stderr)


def _check_out(path: Path | None) -> None:
    """Refuse a file that can't be written before anything long begins."""
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name the file")
    if not path.absolute().parent.is_dir() or not os.access(
        path.absolute().parent, os.W_OK
    ):
        raise ConfigError(f"{path} can't be written; its folder must exist")


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        raise ConfigError(f"{path} can't be written ({error.strerror})") from None
