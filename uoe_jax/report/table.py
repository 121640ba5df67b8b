"""Aligned plain-text tables and numbers with units, for the terminal and the report."""

from __future__ import annotations

from collections.abc import Sequence

from uoe_jax.escape import escape_line


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return rows under a header, text left-aligned and numbers right-aligned."""
    cells = [[escape_line(str(value)) for value in row] for row in rows]
    columns = list(zip(header, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(_is_number(cell) for cell in column[1:]) for column in columns]

    def line(row: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, cells)])


def _is_number(cell: str) -> bool:
    return not cell or cell == "-" or cell[0].isdigit() or cell[0] in "-+."


def si(number: float | int | None, unit: str = "") -> str:
    """Return a number with three significant digits and an SI prefix: 12.3 MFLOP."""
    if number is None:
        return "-"
    for scale, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if abs(number) >= scale:
            return f"{number / scale:.3g} {prefix}{unit}".rstrip()
    if abs(number) >= 1e6:
        return f"{number / 1e6:.3g} M{unit}"
    if abs(number) >= 1e3:
        return f"{number / 1e3:.3g} k{unit}"
    return f"{number:.3g} {unit}".rstrip()
