"""`uoe complete`: fill in a matrix from a file of its entries."""

from __future__ import annotations

from uoe_jax.cli.parse import parse
from uoe_jax.complete.options import CompleteArgs


def complete(args: list[str]) -> int:
    """Complete a file's matrix; jax is imported only once the options are right."""
    options = parse(CompleteArgs, args, "complete")

    from uoe_jax.complete.command import run_complete

    return run_complete(options)
