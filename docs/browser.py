"""Makes the results browser: one self-contained page over every JSON result.

python docs/browser.py results.html

Runs of experiments become rows with curves; a benchmark's file becomes its tables, one
for each list of records in it, whatever the file's form. `browser.html` is the page
around them: it needs no network and no library.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
ABOUT = ("command", "commands", "commit", "device", "machine", "jax", "xla_flags")
ABOUT += ("date", "note")
MOST_ROWS = 2_500  # of one table
PLACE = "/*RESULTS*/"


def result_files(root: Path = ROOT) -> list[Path]:
    """Return the files of all results, benchmarks first."""
    found = [root.glob("benchmarks/results/*.json")]
    found += [root.glob("experiments/*/results/*.json")]
    return [path for paths in found for path in sorted(paths)]


def read_run(path: Path, content: dict[str, Any], root: Path = ROOT) -> dict[str, Any]:
    """Return what the browser shows of a trained model."""
    study = path.parts[-3]
    images = content["config"]["model"]["kind"] != "decoder"  # or classes of texts
    unit, key = (
        ("accuracy, %", "accuracy") if images else ("bits/byte", "bits_per_byte")
    )
    score = lambda split: (content.get(split) or {}).get(key)
    scale = 100 if images else 1
    curve = [
        [point["step"], round(point["seconds"], 2), round(point["train"], 4)]
        for point in content.get("curve") or []
        if point.get("train") is not None
    ]
    return {
        "study": study,
        "case": content["case"],
        "seed": content.get("seed"),
        "parameters": content.get("parameters"),
        "flops": content.get("forward_flops_per_token"),
        "rate": content.get("rate"),
        "steps": content.get("steps"),
        "valid": None if score("valid") is None else scale * score("valid"),
        "test": None if score("test") is None else scale * score("test"),
        "unit": unit,
        "seconds": content.get("seconds"),
        "device": content.get("device"),
        "date": content.get("date"),
        "file": str(path.relative_to(root)),
        "curve": curve,
    }


def flatten(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a record's plain values by dotted name; short lists as text."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            text = json.dumps(value)
            yield prefix + name, text if len(text) <= 60 else f"{len(value)} values"
        else:
            yield prefix + name, value


def tables(content: Any, name: str = "") -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield every list of records in a file, with its path; single records too."""
    if isinstance(content, list):
        records = [item for item in content if isinstance(item, dict)]
        if records:
            yield name or "rows", [dict(flatten(item)) for item in records]
        for place, item in enumerate(records):
            for key, value in item.items():
                if isinstance(value, list) and value and isinstance(value[0], dict):
                    yield from tables(value, f"{name}/{place}/{key}".strip("/"))
    elif isinstance(content, dict):
        rest = {}
        for key, value in content.items():
            inner = isinstance(value, (list, dict)) and value
            if inner and (isinstance(value, dict) or isinstance(value[0], dict)):
                yield from tables(value, f"{name}/{key}".strip("/"))
            elif key not in ABOUT or name:
                rest[key] = value
        if rest:
            yield name or "values", [dict(flatten(rest))]


def merge(found: Iterator[tuple[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Put tables of one record each, side by side in the file, into one."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, rows in found:
        parent, _, last = name.rpartition("/")
        if len(rows) == 1:
            groups.setdefault(parent or "values", []).append({"": last} | rows[0])
        else:
            groups.setdefault(name, []).extend(rows)
    return [
        {"name": name, "rows": rows[:MOST_ROWS], "left_out": len(rows[MOST_ROWS:])}
        for name, rows in groups.items()
    ]


def collect(root: Path = ROOT) -> dict[str, Any]:
    """Return everything that the page holds."""
    runs, files = [], []
    for path in result_files(root):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and "case" in content and "config" in content:
            runs.append(read_run(path, content, root))
            continue
        about = content if isinstance(content, dict) else {}
        about = {**about, **(about.get("about") or {})}
        found = {k: about[k] for k in ABOUT if isinstance(about.get(k), (str, list))}
        files.append(
            {
                "file": str(path.relative_to(root)),
                "about": found,
                "tables": merge(tables(content)),
            }
        )
    return {"runs": runs, "files": files}


def make_page(root: Path = ROOT) -> str:
    """Return the page."""
    content = json.dumps(collect(root), separators=(",", ":")).replace("</", "<\\/")
    page = (DOCS / "browser_page.html").read_text()
    assert page.count(PLACE) == 1
    return page.replace(PLACE, content)


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else "results.html").write_text(make_page())
