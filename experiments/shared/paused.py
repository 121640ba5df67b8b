"""A run that waits: its arrays and what it found so far, as one file."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from uoe_jax.files import format_json, write_atomically
from uoe_jax.runs.checkpoint import snapshot

_TOLD = "told"  # the part of the file that is text


def save_trees(path: Path, trees: Mapping[str, PyTree], told: dict[str, Any]) -> None:
    """Write trees and what goes into JSON; an old file is there until the new one is.

    A tree that is None has no arrays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{t}:{n}": a for t, tree in trees.items() for n, a in snapshot(tree).items()
    }
    content = io.BytesIO()
    np.savez(content, **arrays, **{_TOLD: np.array(format_json(told))})
    write_atomically(path, content.getvalue())


def load_trees(path: Path) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """Return the arrays of each tree that has some, by name, and what was told.

    Infinities come back as None: JSON has none.
    """
    trees: dict[str, dict[str, np.ndarray]] = {}
    with np.load(path, allow_pickle=False) as saved:
        for name in sorted(set(saved.files) - {_TOLD}):
            tree, _, leaf = name.partition(":")
            trees.setdefault(tree, {})[leaf] = saved[name]
        return trees, json.loads(saved[_TOLD].item())
