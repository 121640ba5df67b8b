"""What the command line says aside: that it began, and the library's warnings."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from uoe_jax.escape import escape_line

# How jax's warning of an entry of its compile cache that it can't read begins.
_DAMAGED_ENTRY = "Error reading persistent compilation cache entry"


def tell_loading(what: object) -> None:
    """Say on a terminal that a run is being loaded, which is silent for seconds."""
    if sys.stderr.isatty():
        print(f"loading {escape_line(str(what))} ...", file=sys.stderr, flush=True)


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Print a UserWarning as one line on stderr, without a place in code.

    Damaged entries of the compile cache, hundreds as a rule, get one line together.
    """
    told: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        show = warnings.showwarning

        def show_plain(
            message: Any, category: type[Warning], *place: Any, **options: Any
        ) -> None:
            if category is not UserWarning:
                show(message, category, *place, **options)
                return
            text = str(message)
            if text.startswith(_DAMAGED_ENTRY):
                text = _damaged_cache(text)
            if text not in told:
                print(f"uoe: {escape_line(text)}", file=sys.stderr)
            told.add(text)

        warnings.showwarning = show_plain
        yield


def _damaged_cache(text: str) -> str:
    import jax

    folder = jax.config.jax_compilation_cache_dir  # pyrefly: ignore[missing-attribute]
    return (
        f"warning: the compile cache {folder} is damaged, so programs are compiled "
        "again; delete that folder to have them kept"
    )
