"""On which scale a setting's numbers are near each other, and their vectors.

Two forms: thermometers as in Gallant's paper, and random Fourier features (Rahimi and
Recht 2007), whose products are exp(-d^2 / 2) for numbers d apart on their scale.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float, Float32

from uoe_jax.config import ExperimentConfig
from uoe_jax.fields import Bounds, Seed, field_hints
from uoe_jax.runs.binding import Rows, atom, normals, random_bits
from uoe_jax.runs.leaves import LENGTH, Path

# Kinds of settings. log: what counts is the ratio; twice as large is one apart. share:
# of a whole, so .9 and .99 are as far apart as .1 and .01. category: equal or not.
# label: names and places, what decides nothing that a run finds out, and the seed: runs
# that differ in it are repeats. Labels are left out.
LOG, SHARE, CATEGORY, LABEL = "log", "share", "category", "label"

_TINY = 2.0**-100  # zero lies this far down, in doublings
_THRESHOLDS = 32  # of a thermometer, for each sign

# A field's kind follows from its type and bounds, but for these.
_EXCEPTIONS = {
    LABEL: """
        name data.data_dir data.cache_dir data.allow_changed train.log_every
        train.save_every train.keep_checkpoints train.tensorboard train.wandb
        train.profile train.replay_every train.seed
    """,
    SHARE: "optim.final_lr_fraction",  # which may be above 1
}


def _field_kinds(cls: type, path: Path = ()) -> Iterator[tuple[Path, str]]:
    for name, hint in field_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _field_kinds(typing.cast(type, hint), (*path, name))
        else:
            yield (*path, name), _hinted_kind(hint)


def _hinted_kind(hint: Any) -> str:
    """Return the kind that a field's annotation gives it.

    Numbers are `log`, fractions of one `share`; words, flags and seeds are categories.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint == Seed:
        return CATEGORY
    if origin is Annotated:
        for rule in args[1:]:
            if isinstance(rule, Bounds) and args[0] is float:
                low, high = max(rule.least, rule.above), min(rule.most, rule.below)
                return SHARE if low == 0 and high == 1 else LOG
        return _hinted_kind(args[0])
    if origin in (types.UnionType, typing.Union):
        return _hinted_kind(next(a for a in args if a is not type(None)))
    if origin is tuple:
        return _hinted_kind(args[0])
    return LOG if hint in (int, float) else CATEGORY


# The kind of every field of a run's config.
KINDS: dict[Path, str] = dict(_field_kinds(ExperimentConfig)) | {
    tuple(name.split(".")): kind
    for kind, names in _EXCEPTIONS.items()
    for name in names.split()
}
LABELS = frozenset(path for path, kind in KINDS.items() if kind == LABEL)


def kind_of(path: Path) -> str:
    """Return the kind of the number at a path; numbers of foreign JSON are `log`.

    But for those whose key says that they are names: seeds and ids.
    """
    names = tuple(step for step in path if isinstance(step, str))
    if names in KINDS:
        return KINDS[names]
    if not path or path[-1] == LENGTH:
        return LOG
    last = names[-1].lower() if names else ""
    named = last in ("seed", "id", "uid", "uuid", "hash")
    return CATEGORY if named or last.endswith(("_id", "_seed")) else LOG


def to_scale(kind: str, x: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Return where numbers lie on a kind's scale."""
    if kind == SHARE:
        x = np.clip(x, 1e-6, 1 - 1e-6)
        return np.log2(x / (1 - x))
    # The logarithm of 1 + |x| / tiny without its overflow.
    return np.sign(x) * np.logaddexp2(0, np.log2(np.maximum(abs(x), 1e-308)) + 100)


def from_scale(kind: str, u: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Return the numbers at places of a kind's scale."""
    if kind == SHARE:
        return 1 / (1 + np.exp2(-u))
    # Beyond 2^53 the one that is taken away is less than rounding.
    size = np.where(abs(u) < 60, np.expm1(np.log(2) * np.minimum(abs(u), 60)) * _TINY,
                    np.exp2(abs(u) - 100))  # fmt: skip
    return np.sign(u) * size


class Fourier:
    """Numbers as [cos(w u), sin(w u)] with w normal: smooth, of length one."""

    def __init__(self, dim: int):
        self.dim = dim
        self._frequencies = normals(random_bits("number", "fourier"), dim // 2)

    def encode(self, kind: str, x: Float[np.ndarray, " N"], path: Path = ()) -> Rows:
        """Return the vectors of numbers."""
        return self.at(to_scale(kind, x))

    def at(self, u: Float[np.ndarray, " N"]) -> Rows:
        """Return the vectors of places on the scale."""
        angles = np.asarray(u, float)[:, None] * self._frequencies.astype(float)
        angles = np.remainder(angles, 2 * np.pi).astype(np.float32)
        rows = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        return rows * np.float32((self.dim / 2) ** -0.5)


class Thermometer:
    """Numbers as the sum of the vectors of all thresholds they pass, as in the paper.

    Thresholds are those of the path's numbers, if some were given, else powers of ten.
    """

    def __init__(
        self, dim: int, thresholds: dict[Path, Sequence[float | int]] | None = None
    ):
        self.dim = dim
        sides = np.geomspace(1e-16, 1e15, _THRESHOLDS)
        self._default = np.concatenate([-sides[::-1], sides])
        self._own = {p: np.array(t, float) for p, t in (thresholds or {}).items()}
        self._sums = functools.lru_cache(256)(self._make_sums)

    def _make_sums(self, path: Path) -> Rows:
        """Return the vectors of numbers that pass 0, 1, 2... thresholds."""
        count = len(self._thresholds(path))
        rows = [atom("threshold", str(i), self.dim) for i in range(count + 1)]
        sums = np.cumsum(rows, axis=0)
        return sums / np.linalg.norm(sums, axis=1, keepdims=True)

    def _thresholds(self, path: Path) -> Float[np.ndarray, " T"]:
        return self._own.get(path, self._default)

    def encode(self, kind: str, x: Float[np.ndarray, " N"], path: Path = ()) -> Rows:
        """Return the vectors of numbers."""
        passed = np.searchsorted(self._thresholds(path), x, side="right")
        own = path if path in self._own else ()
        return self._sums(own)[passed].astype(np.float32)


def quantile_thresholds(
    values: Float[np.ndarray, " N"], count: int = _THRESHOLDS
) -> Float32[np.ndarray, " T"] | Float[np.ndarray, " T"]:
    """Return at most `count` thresholds between the distinct values of a setting."""
    distinct = np.unique(values)
    if len(distinct) > count:
        places = np.linspace(0, len(distinct) - 1, count).round().astype(int)
        distinct = distinct[places]
    return distinct
