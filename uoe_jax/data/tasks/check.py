"""`python -m uoe_jax.data.tasks.check FILE`: the evaluator against published labels.

FILE has a line for each expression, its value, a tab and its tokens, as the original
ListOps files have (packed with xz, gz or bz2 or not).
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from uoe_jax.data.files import open_content
from uoe_jax.data.tasks.listops import evaluate
from uoe_jax.errors import DataError, UoeError


def check_labels(path: Path) -> tuple[int, list[int], Counter[str]]:
    """Return lines read, the numbers of those that disagree, and tokens counted.

    Raises DataError if a line isn't a value, a tab and an expression.
    """
    wrong, seen, total = [], Counter[str](), 0
    with open_content(path) as lines:
        for number, line in enumerate(lines, 1):
            label, tab, tokens = line.decode().rstrip("\n").partition("\t")
            if not tab or not label.isdigit():
                raise DataError(
                    f"{path} line {number} isn't a value, a tab and tokens; give a "
                    "ListOps file"
                )
            words = tokens.split()
            seen.update(words)
            total += 1
            if evaluate(words) != int(label):
                wrong.append(number)
    return total, wrong, seen


def main(args: list[str]) -> int:
    """Print how many labels agree; 0 if all do, 1 if not, 2 for a bad request."""
    if len(args) != 1:
        print("usage: python -m uoe_jax.data.tasks.check FILE", file=sys.stderr)
        return 2
    try:
        total, wrong, seen = check_labels(Path(args[0]))
    except UoeError as error:
        print(f"uoe: {error}", file=sys.stderr)
        return error.exit_code
    operators = ", ".join(f"{k} {v}" for k, v in sorted(seen.items()) if k[0] == "[")
    print(f"{total} expressions ({operators})")
    print(f"{total - len(wrong)} labels agree, {len(wrong)} differ")
    if wrong:
        print(f"lines that differ: {', '.join(map(str, wrong[:10]))}")
    return 1 if wrong or not total else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
