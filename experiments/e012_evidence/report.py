"""Make every table and figure of the study again from its results.

    python -m experiments.e012_evidence.report --results runs/e012/results.json \
        --out runs/e012

Several results files, as of several cards, count as one. Writes OUT/tables.md and
OUT/figures/*.png. A comparison that isn't in planned.json, or was written there after
the first run, is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.e012_evidence.figures import figures
from experiments.e012_evidence.study import PLANNED
from experiments.e012_evidence.tables import all_tables
from experiments.shared.compare import read_plan
from uoe_jax.errors import ConfigError, UoeError
from uoe_jax.files import parse_json, write_atomically


def report(files: Sequence[Path], out: Path) -> str:
    """Write tables and figures; return the tables."""
    plan, rows = read_plan(PLANNED), []
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{file} doesn't exist; run the study first")
        results = parse_json(file.read_text("utf-8"), file.name)
        plan.check(results["planned"])
        rows += results["runs"]
    text = all_tables(rows, plan)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    write_atomically(out / "tables.md", text)
    for name, content in figures(rows).items():
        write_atomically(out / "figures" / name, content)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; 0, or 2 for a bad request."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", nargs="+", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    try:
        print(report(options.results, options.out))
    except UoeError as error:
        print(f"experiment: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
