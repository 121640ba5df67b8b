"""`uoe runs`: all runs in a table, what is like one, why, and what to expect."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from uoe_jax.cli.parse import Experiment, parse
from uoe_jax.cli.search_index import index_folder
from uoe_jax.cli.search_targets import (
    EXPERIMENTS,
    find_record,
    open_foreign,
    open_runs,
    take_plan,
    tell_broken,
    write_file,
)
from uoe_jax.errors import ConfigError
from uoe_jax.escape import escape_line
from uoe_jax.fields import Count
from uoe_jax.files import check_target, format_json
from uoe_jax.runs.find import RUNS
from uoe_jax.runs.index import RunIndex
from uoe_jax.runs.leaves import show_path
from uoe_jax.runs.read import RunRecord
from uoe_jax.runs.search import Difference, expect, explain, like, show_value
from uoe_jax.runs.table import select, show_column

_METRICS = Literal["loss", "bits_per_byte", "accuracy"]
_COLUMNS = ("loss", "parameters", "seconds", "steps", "model", "date")
_WRITTEN = 4  # differences in a line of a table


@dataclass(frozen=True, kw_only=True)
class RunsOptions:
    """List runs; `uoe runs like|explain|expect|index --help` for what else it does."""

    # Folders; runs/ if none is given, experiments/ where that holds no run.
    folders: Positional[Annotated[tuple[str, ...], arg(metavar="FOLDER...")]] = ()
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

    runs: Positional[Annotated[tuple[str, ...], arg(metavar="A B")]] = ()
    index: Path | None = None  # a folder that uoe runs index went through
    json: bool = False  # one JSON object instead of a table


@dataclass(frozen=True, kw_only=True)
class ExpectOptions:
    """Loss to expect of RUN, or PRESET with options, from the runs most like it."""

    config: Experiment
    metric: _METRICS = "loss"  # the outcome to expect
    level: float = 0.8  # share of plans whose result the interval is to hold
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
    check_target(options.page, "--page")
    check_target(options.map, "--map")
    index, others = open_runs([Path(folder) for folder in options.folders]), 0
    if not options.folders:  # one's own, if there are any
        index, others = _own_runs(index)
    chosen = select(index.records, options.where, options.sort, options.descending)
    names = list(dict.fromkeys([*_COLUMNS, *options.columns]))
    written = _write_pictures(options, index, chosen, names)
    if options.json:
        found = {
            "runs": [dataclasses.asdict(record) for record in chosen[: options.limit]],
            "broken": [dataclasses.asdict(record) for record in index.broken],
        }
        print(format_json(found | written, indent=2))
    else:
        _print_runs(index, chosen[: options.limit], names, others)
        for kind, path in written.items():
            print(escape_line(f"{kind}: {path}"))
    tell_broken(index.broken)
    return 0


def _own_runs(index: RunIndex) -> tuple[RunIndex, int]:
    """Return the runs below runs/, and how many others there are; all if none is."""
    own = [r for r in index.records if Path(r.path).is_relative_to(RUNS)]
    return (index.subset(own), len(index) - len(own)) if own else (index, 0)


def _print_runs(
    index: RunIndex, chosen: list[RunRecord], names: list[str], others: int
) -> None:
    from uoe_jax.report.table import format_table

    rows = [(r.path, *(show_column(r, name) for name in names)) for r in chosen]
    if rows:
        print(format_table(("run", *names), rows))
    of = "" if len(chosen) == len(index) else f" of {len(index):,}"
    more = f"; {others:,} below {EXPERIMENTS}/: uoe runs {EXPERIMENTS}"
    print(f"{len(chosen):,}{of} runs" + (more if others else ""))


def _write_pictures(
    options: RunsOptions, index: RunIndex, chosen: list[RunRecord], names: list[str]
) -> dict[str, str]:
    """Write the map and the page that are asked for; return where each went."""
    if options.map is None and options.page is None:
        return {}
    from uoe_jax.report.many_runs import draw_map, runs_page

    part, written = index.subset(chosen), {}
    if options.map is not None:
        pngs = draw_map(part, options.metric)
        if not pngs:
            raise ConfigError(f"a map takes 2 runs; these are {len(chosen)}")
        write_file(options.map, pngs["light"])
        written["map"] = str(options.map)
    if options.page is not None:
        rows = [(r.path, *(show_column(r, name) for name in names)) for r in chosen]
        text = runs_page(part, ("run", *names), rows, options.metric)
        write_file(options.page, text.encode())
        written["page"] = str(options.page)
    return written


def like_run(args: list[str]) -> int:
    """Print the runs most like a run or a plan."""
    options, record = take_plan(LikeOptions, args, "like")
    index = open_foreign(options.index) if options.index else open_runs([])
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
    index = open_foreign(options.index) if options.index else open_runs([])
    first, second = (find_record(name, index) for name in options.runs)
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
    options, record = take_plan(ExpectOptions, args, "expect")
    found = expect(open_runs([]), record, metric=options.metric, level=options.level)
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
