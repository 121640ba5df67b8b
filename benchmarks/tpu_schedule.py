"""Seconds of a TPU kernel from the compiler's own instruction schedule.

XLA's cost analysis knows of a Pallas kernel only what the kernel declares. The schedule
knows more: libtpu can write the final instruction bundles of every kernel, one bundle a
cycle. Bundles of each region (but never less than the matrix units need for it), times
how often the tile plan enters it, over the clock. Not in it: stalls on memory, copies
slower than the work they run under, and other latencies that the hardware, not the
schedule, interlocks.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uoe_jax.ops import tpu
from uoe_jax.ops.segment_attention.tpu.schedule import EDGE

LANES = tpu.LANES


@dataclass(frozen=True)
class Region:
    """Bundles of one region of a program and how deep in loops it lies."""

    start: int
    size: int
    depth: int

    def holds(self, other: Region) -> bool:
        end = other.start + other.size
        return self.start <= other.start and end <= self.start + self.size


def read_regions(path: Path) -> tuple[list[Region], int]:
    """Return the regions of a final_bundles dump, and its number of bundles."""
    open_at: dict[str, tuple[int, int]] = {}
    regions, bundles = [], 0
    for line in path.read_text().splitlines():
        match = re.match(r"\s*(0x[0-9a-f]+)\s*(?:[A-Z]{2})?\s*: ([> ]*)", line)
        if not match:
            continue
        address, depth = int(match.group(1), 16), match.group(2).count(">")
        bundles += 1
        for word, name in re.findall(r"(Start|End) region (\d+)", line):
            if word == "Start":
                open_at[name] = address, depth
            elif name in open_at:
                first, level = open_at.pop(name)
                regions.append(Region(first, address - first + 1, level))
    return sorted(set(regions), key=lambda r: (r.start, -r.size)), bundles


@dataclass(frozen=True)
class StreamSchedule:
    """Bundles of a kernel that streams chunks past a tile."""

    tile: int  # once a tile: the diagonal, the first copy, the output
    diagonal: int  # once a tile and head, where the diagonal is a loop over heads
    chunk: int  # once a chunk: copies, waits, bookkeeping
    clear: int  # a whole chunk that every row sees
    edges: tuple[int, ...]  # masked blocks, by falling size: half the rows, all rows

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def read_stream(path: Path) -> StreamSchedule:
    """Return the parts of an attention kernel's schedule."""
    regions, bundles = read_regions(path)
    loops = [r for r in regions if r.depth == 2]
    body = max(loops, key=lambda r: r.size)
    inside = [r for r in regions if body.holds(r) and r.size < body.size * 0.97]
    edge = max((r for r in inside if r.depth == 2), key=lambda r: r.size)
    before = [r for r in inside if r.depth == 2 and r.start + r.size <= edge.start]
    clear = max(before, key=lambda r: r.size)
    blocks = [r for r in inside if edge.holds(r) and r.size >= 100]
    blocks = _innermost([r for r in blocks if r.size < edge.size * 0.97] or [edge])
    copies = [r for r in inside if r.depth == 3 and not edge.holds(r)]
    others = [r for r in loops if not body.holds(r)]
    # Single-grain copies are the other loops; they are short.
    diagonal = max((r.size for r in others if r.size >= 150), default=0)
    return StreamSchedule(
        tile=bundles - body.size - _covered(others),
        diagonal=diagonal,
        chunk=body.size - edge.size - clear.size - _covered(copies),
        clear=clear.size,
        edges=tuple(r.size for r in blocks),
    )


def _innermost(regions: list[Region]) -> list[Region]:
    """Return the regions that hold no other of them, in program order."""
    return [r for r in regions if not any(o != r and r.holds(o) for o in regions)]


def _covered(regions: list[Region]) -> int:
    """Return the bundles that lie in any of the regions."""
    return len({at for r in regions for at in range(r.start, r.start + r.size)})


def stream_cycles(
    schedule: StreamSchedule,
    blocks: tuple[dict, dict, dict],
    rows: int,
    chunk: int,
    pair: float,
    *,
    heads: int = 1,
) -> int:
    """Return the cycles of the blocks a kernel visits; `pair`: of one score entry."""
    diagonal, clear, edges = blocks
    tiles = max(diagonal.values())
    sizes = [min(chunk, EDGE) >> i for i in range(8)]
    sizes = [size for size in sizes if size >= LANES]
    halves = len(schedule.edges) == 2 * len(sizes)
    cost = {}
    for number, size in enumerate(sizes):
        if halves:
            cost[rows // 2, size], cost[rows, size] = schedule.edges[2 * number :][:2]
        else:
            cost[rows, size] = schedule.edges[number]
    atleast = lambda bundles, own, other: max(bundles, own * other * pair)
    squares = sum(n * own * other for (own, other), n in diagonal.items()) / tiles
    own = schedule.tile + heads * schedule.diagonal
    total = tiles * max(own, heads * squares * pair)
    total += heads * (sum(clear.values()) + sum(edges.values())) * schedule.chunk
    total += heads * sum(clear.values()) * atleast(schedule.clear, rows, chunk)
    for (part, size), count in edges.items():
        if count:
            total += heads * count * atleast(cost[part, size], part, size)
    return round(total)


def grid_cycles(path: Path, steps: int, least: float) -> int:
    """Return the cycles of a kernel that runs its whole body in each grid step.

    `least` is what the matrix units need for one step.
    """
    _, bundles = read_regions(path)
    return round(steps * max(bundles, least))


def find_dump(folder: Path, kernel: str) -> Path:
    """Return the newest final_bundles dump of a kernel by name."""
    found = sorted(folder.glob(f"*{kernel}*[0-9]-final_bundles.txt"))
    if not found:
        raise FileNotFoundError(f"no schedule of {kernel} in {folder}")
    return found[-1]


def clear_dump(folder: Path) -> None:
    """Delete what the compiler wrote; a kernel leaves hundreds of files."""
    for path in folder.iterdir():
        path.unlink()
