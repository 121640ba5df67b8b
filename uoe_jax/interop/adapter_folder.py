"""The two files of an adapter's folder, as anybody may have written them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.flax import load

from uoe_jax.errors import DataError
from uoe_jax.files import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every key that PEFT writes


def read_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json; DataError if there is none or it is malformed."""
    path = folder / CONFIG
    if not path.is_file():
        raise DataError(
            f"{folder} has no {CONFIG}; give a folder that holds an adapter"
        )
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise DataError(f"{path} is {type(raw).__name__}; expected an object")
    return raw


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Return a safetensors file's arrays by key.

    Raises DataError for a missing or damaged file, for numbers that aren't finite, and
    for any other format: pickles run code when they are loaded, so they never are.
    """
    if path.suffix != ".safetensors":
        raise DataError(
            f"{path} is not a .safetensors file; pickled formats aren't read: convert "
            "it with the tool that wrote it"
        )
    if not path.is_file():
        pickled = [p.name for p in path.parent.glob("adapter_model.*") if p != path]
        hint = f" ({pickled[0]} is pickled: convert it)" if pickled else ""
        raise DataError(f"{path} doesn't exist{hint}")
    try:
        # The flax reader knows bfloat16; host arrays, so that nothing is compiled.
        # Read, not mapped: a map of a file that is cut short ends the process.
        tensors = {k: np.asarray(v) for k, v in load(path.read_bytes()).items()}
    except (SafetensorError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} can't be read: {reason}") from None
    for key, array in tensors.items():
        if not np.all(np.isfinite(array)):
            count = int(np.sum(~np.isfinite(array)))
            raise DataError(
                f"{path}: {key} has {count} of {array.size} numbers not finite; use an "
                "adapter from before its training diverged"
            )
    return tensors
