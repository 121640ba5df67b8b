"""The collectives of a compiled program, from its text: how often, how many bytes."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "ragged-all-to-all",  # bytes are of its room: what is sent is known when it runs
    "all-to-all",
    "collective-permute",
)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
          "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+[0-9]*)(?:e\dm\d\w*)?\[([\d,]*)\]")
_CALL = re.compile(r"(?:body|calls|to_apply|called_computations|branch_computations)="
                   r"\{?([^,}]*(?:, *%[^,}]*)*)\}?")  # fmt: skip
_GROUPS = re.compile(r"replica_groups=(?:\{\{|\[|mesh)")
_PAIRS = re.compile(r"source_target_pairs=\{([\d{},\s]*)\}")
# Whose results are one device's share of the array.
_SHARES = ("reduce-scatter", "ragged-all-to-all", "all-to-all")
_OPERATION = re.compile(rf"[\])}}] ({'|'.join(KINDS)})(-start)?\(")


def traffic(text: str) -> list[dict[str, Any]]:
    """Return the collectives of a program's text (HLO), the most bytes first.

    Bytes are of the whole array: what a gather returns, what a reduction takes, what
    the devices of an exchange or a ring have together. A loop's are counted once for
    each turn. Raises ValueError where a loop that holds collectives doesn't say its
    turns.
    """
    parts = _computations(text)
    found: Counter[tuple[str, int]] = Counter()
    for name, times in _times(parts).items():
        for line in parts[name]:
            operation = _OPERATION.search(line)
            alone = operation and _GROUPS.search(line) and _group_size(line) == 1
            if operation and not alone:
                kind, started = operation.group(1), bool(operation.group(2))
                size = _whole_bytes(line, kind, started, operation.start())
                found[kind, size] += times
    rows = [
        {"kind": kind.replace("-", "_"), "bytes": size, "count": count}
        for (kind, size), count in found.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"] * row["count"])


def _computations(text: str) -> dict[str, list[str]]:
    """Return the lines of every computation; the entry's name is ""."""
    parts: dict[str, list[str]] = {}
    name = None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            entry = line.startswith("ENTRY")
            name = "" if entry else line.split()[0].lstrip("%")
            parts[name] = []
        elif name is not None:
            parts[name].append(line)
    return parts


def _times(parts: dict[str, list[str]]) -> dict[str, int]:
    """Return how often each computation that is reached from the entry runs."""
    times: Counter[str] = Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in parts[name]:
            turns = count
            if re.search(r" while\(", line):
                turns = count * _turns(line, parts)
            for names in _CALL.findall(line):
                for called in names.split(","):
                    called = called.strip().lstrip("%")
                    if called in parts:
                        visit(called, turns)

    if "" in parts:
        visit("", 1)
    return dict(times)


def _turns(line: str, parts: dict[str, list[str]]) -> int:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known.group(1))
    body = re.search(r"body=%?([\w.\-]+)", line)
    lines = parts.get(body.group(1), []) if body else []
    if any(_OPERATION.search(inner) for inner in lines):
        raise ValueError(f"a loop of unknown length holds collectives: {line[:120]}")
    return 1


def _whole_bytes(line: str, kind: str, started: bool, stop: int) -> int:
    """Return the bytes of a collective's whole array from its line."""
    text = line[:stop].split(" = ", 1)[1]
    shapes = [_size(*shape) for shape in _SHAPE.findall(_results(text))]
    if kind == "collective-permute":  # the first: operand and result are alike
        return shapes[0] * _group_size(line)
    flat = started and not text.startswith("((")
    if flat and kind != "all-reduce" and len(shapes) > 1:
        shapes = shapes[len(shapes) // 2 :]  # operands, then results
    total = sum(shapes)
    return total * _group_size(line) if kind in _SHARES else total


def _results(text: str) -> str:
    """Return the types of a started collective's results: `((operands), results)`."""
    if not text.startswith("(("):
        return text
    depth, end = 1, 2
    while depth and end < len(text):
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        end += 1
    return text[end:]


def _size(dtype: str, sides: str) -> int:
    count = math.prod(int(side) for side in sides.split(",")) if sides else 1
    return count * _BYTES.get(dtype, 1)


def _group_size(line: str) -> int:
    """Return the devices of a collective's group."""
    if pairs := _PAIRS.search(line):
        return _ring_size(re.findall(r"(\d+) *, *(\d+)", pairs.group(1)))
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return listed.group(1).count(",") + 1
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(tiled.group(1))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        return math.prod(int(sizes[a]) for a in re.findall(r"'(\w+)'", named.group(2)))
    return 1


def _ring_size(pairs: list[tuple[str, str]]) -> int:
    """Return the most devices that pairs of a source and a target join."""
    rings: dict[str, set[str]] = {}
    for source, target in pairs:
        joined = rings.get(source, {source}) | rings.get(target, {target})
        rings |= dict.fromkeys(joined, joined)
    return max(map(len, rings.values()), default=1)
