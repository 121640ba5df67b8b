"""Make every table and figure of the study again from its results.

    python -m experiments.e012_evidence.report --results runs/e012/results.json \
        --out runs/e012

Several results files, as of several cards, count as one; those of other texts are
refused. Writes OUT/tables.md and OUT/figures/*.png; with `--page FILE` also the page of
what came out and its picture beside it, which is refused while no run has come to its
end. A comparison that isn't in planned.json, or was written there after the first run,
is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.e012_evidence.figures import figures
from experiments.e012_evidence.page import results_page
from experiments.e012_evidence.study import PLANNED
from experiments.e012_evidence.tables import all_tables, find_groups, verdicts
from experiments.shared.compare import read_plan
from uoe_jax.errors import ConfigError, UoeError
from uoe_jax.files import parse_json, write_atomically


def report(files: Sequence[Path], out: Path, page: Path | None = None) -> str:
    """Write tables and figures, and a page of what came out; return the tables."""
    plan, rows, texts = read_plan(PLANNED), [], {}
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{file} doesn't exist; run the study first")
        results = parse_json(file.read_text("utf-8"), file.name)
        plan.check(results["planned"])
        rows += results["runs"]
        _check_texts(texts, results, file)
    text, drawn, groups = all_tables(rows, plan), figures(rows), find_groups(rows)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    write_atomically(out / "tables.md", text)
    for name, content in drawn.items():
        write_atomically(out / "figures" / name, content)
    if page is not None:
        said, shown = results_page(verdicts(plan, groups), groups, list(drawn))
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(page, said)
        write_atomically(page.parent / shown, drawn[shown])
    return text


def _check_texts(texts: dict[str, Any], results: dict[str, Any], file: Path) -> None:
    """Note what identifies a file's texts; ConfigError if another was made with others.

    As while running: results that are copied together from elsewhere were never looked
    at together.
    """
    for place, contents in results.get("texts", {}).items():
        noted = texts.setdefault(place, contents)
        names = sorted(noted.keys() | contents.keys())
        other = [n for n in names if noted.get(n) != contents.get(n)]
        if other:
            raise ConfigError(
                f"{file} was made with another text of {', '.join(other)} than the "
                "results before it; report each alone"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; 0, or 2 for a bad request."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", nargs="+", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="docs/results/evidence.md")
    options = parser.parse_args(argv)
    try:
        print(report(options.results, options.out, options.page))
    except UoeError as error:
        print(f"experiment: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
