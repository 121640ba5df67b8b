"""A family's tensors beside those of a file: nothing missing, left over, mis-shaped."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from uoe_jax.config import DType
from uoe_jax.errors import DataError
from uoe_jax.interop.names import Family, Source, by_tensor, spellings

_SHOWN = 8
_FLOATS = ("F64", "F32", "F16", "BF16")


class Match(NamedTuple):
    """The file's name of every tensor that is read, and what is left alone."""

    files: dict[str, str]
    ignored: tuple[str, ...]  # names in the file that hold no weights, or copies


def match_tensors(
    files: Any, sources: list[Source], family: Family, where: str
) -> Match:
    """Return which of a file's tensors is which of a family's.

    `files` has `tensors` by name, with `shape` and `dtype`, and `read`. Raises
    DataError with all that are missing, left over or of another shape, and for copies
    of a tensor that differ from it.
    """
    wanted = by_tensor(sources)
    names, found, problems = files.names(), {}, []
    for tensor, group in wanted.items():
        have = [name for name in spellings(tensor, family) if name in names]
        if not have:
            problems.append(f"{tensor} is missing")
            continue
        found[tensor] = have[0]
        shape = files.tensors[have[0]].shape
        if tuple(shape) != group[0].shape:
            problems.append(
                f"{have[0]} is {list(shape)}, expected {list(group[0].shape)}"
            )
    spelled = lambda name: [s for s in spellings(name, family) if s in names]
    copies = {
        copy: original
        for name, original in family.same.items()
        if name not in wanted
        for copy in spelled(name)
    }
    left = sorted(names - set(found.values()) - set(copies))
    ignored = [n for n in left if any(re.fullmatch(p, n) for p in family.ignored)]
    problems += [f"{n} has no place" for n in left if n not in ignored]
    if problems:
        more = len(problems) - _SHOWN
        raise DataError(
            f"{where} isn't a whole {family.architecture}: "
            + "; ".join(problems[:_SHOWN])
            + (f"; and {more} more" if more > 0 else "")
        )
    for copy, original in copies.items():
        _check_copy(files, copy, found.get(original, original), where)
    return Match(found, (*ignored, *sorted(copies)))


def _check_copy(files: Any, copy: str, original: str, where: str) -> None:
    """Raise DataError where a tensor differs from the one that it should repeat."""
    first, second = files.read(copy), files.read(original)
    if first.shape != second.shape or not np.array_equal(first, second):
        raise DataError(
            f"{where}: {copy} differs from {original}, and config.json ties them "
            "(tie_word_embeddings); set it to false if they are two"
        )


def find_dtype(files: Any, match: Match, where: str) -> DType:
    """Return the dtype that holds all tensors: theirs, or float32 for others.

    Raises DataError for tensors that hold no floating-point numbers.
    """
    dtypes = {files.tensors[name].dtype for name in match.files.values()}
    for tensor in match.files.values():
        if files.tensors[tensor].dtype not in _FLOATS:
            raise DataError(
                f"{where}: {tensor} is {files.tensors[tensor].dtype}; weights are read "
                f"in {', '.join(_FLOATS)}"
            )
    return "bfloat16" if dtypes == {"BF16"} else "float32"
