"""Warnings of the library, as the command line shows them."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from uoe_jax.escape import escape


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Print a UserWarning as one line on stderr, without a place in code."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        show = warnings.showwarning

        def show_plain(
            message: Any, category: type[Warning], *place: Any, **options: Any
        ) -> None:
            if category is UserWarning:
                print(f"uoe: {escape(str(message))}", file=sys.stderr)
            else:
                show(message, category, *place, **options)

        warnings.showwarning = show_plain
        yield
