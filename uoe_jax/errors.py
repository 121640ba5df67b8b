"""Errors a user can act on: one line with the value, the rule and the fix."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from uoe_jax.escape import escape_line


class UoeError(Exception):
    """A problem with a one-line message; the command line exits with `exit_code`."""

    exit_code = 1

    def __str__(self) -> str:
        return escape_line(super().__str__())


class ConfigError(UoeError, ValueError):
    """A request that can't be carried out; found before anything compiles."""

    exit_code = 2


class MissingExtra(ConfigError, ImportError):
    """A package that only an extra installs, and that isn't there."""


class DataError(UoeError, ValueError):
    """Data that is missing, empty, malformed or not what its manifest says."""

    exit_code = 2


class CheckpointError(UoeError, ValueError):
    """A checkpoint that is absent, foreign, incomplete or corrupt."""

    exit_code = 2


class ReplayError(UoeError):
    """Gradients of the same weights and batch that had other bits the second time."""


class NonFiniteError(UoeError, FloatingPointError):
    """Too many steps in a row had a non-finite loss or gradient."""

    exit_code = 3


# Which extra of pyproject.toml brings a package.
EXTRAS = {
    "array_record": "data",
    "gcsfs": "gs",
    "gguf": "gguf",
    "huggingface_hub": "hf",
    "importlib_resources": "data",
    "jax_triton": "kernels",
    "jinja2": "hf",
    "lm_eval": "lm-eval",
    "matplotlib": "report",
    "PIL": "data",
    "pyarrow": "data",
    "s3fs": "s3",
    "scipy": "data",
    "sklearn": "data",
    "tensorboardX": "tensorboard",
    "tensorflow_datasets": "data",
    "tokenizers": "data",
    "usearch": "search",
    "wandb": "wandb",
}


@contextmanager
def extra_packages() -> Iterator[None]:
    """Around imports: a package that isn't there is named with the extra it is in.

    Raises:
      MissingExtra: one line with what to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        raise MissingExtra(
            f"this needs {package}, which isn't installed; "
            f"pip install 'uoe_jax[{EXTRAS[package]}]' (or 'uoe_jax[all]')"
        ) from error


def shown(value: object, limit: int = 80) -> str:
    """Return a value as one short line, whatever it holds."""
    if type(value) is int and abs(value) >= 10**40:  # Python won't print them all
        return f"{'-' if value < 0 else ''}1e{math.log10(abs(value)):.0f}"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an object's own repr
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def all_divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def divisors(number: int, limit: int = 8) -> str:
    """Return the divisors of a positive number, at most `limit` of them, as text."""
    words = [str(d) for d in all_divisors(number)]
    if len(words) > limit:
        words = [*words[: limit - 1], "...", words[-1]]
    return ", ".join(words)


def choose[Found](name: str, value: object, table: Mapping[str, Found]) -> Found:
    """Return what a word stands for; raise ConfigError for a word that isn't known."""
    if not isinstance(value, str) or value not in table:
        fix = nearest(str(value), table)
        raise ConfigError(f"{name} is {shown(value)}; {fix}")
    return table[value]


class OutOfMemory(UoeError):
    """A device's memory, or the machine's, is too small for what was asked."""

    exit_code = 4


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, the machine's or a device's."""
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    return type(error).__name__ == "JaxRuntimeError" and (
        "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
    )


def first_line(error: BaseException, limit: int = 200) -> str:
    """Return the first line of what an error says, at most `limit` characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:limit]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean ...?" with the closest known names, or the whole list."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    return "known: " + ", ".join(known)
