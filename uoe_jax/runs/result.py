"""What making a run of another model found, in the run's folder. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uoe_jax.errors import DataError
from uoe_jax.files import format_json, read_json, write_atomically

RESULT = "surgery.json"
_OLD_RESULT = "decompose.json"  # of runs that were written before all changes had one


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write what was found, for `read_result`."""
    write_atomically(folder / RESULT, format_json(dict(result), indent=2) + "\n")


def read_result(folder: Path) -> dict[str, Any]:
    """Return what making a run found, {} for a run that was trained from the start.

    Raises DataError if the file is damaged.
    """
    file = folder / RESULT
    if not file.is_file():
        file = folder / _OLD_RESULT
    try:
        return dict(read_json(file))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{file} is damaged ({reason}); restore the file") from None
