"""What a text shows of a model, kept in a file: seen once, read by every later cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uoe_jax.compress.devices import data_mesh
from uoe_jax.compress.files import (
    digest_arrays,
    from_triangle,
    read_about,
    read_arrays,
    to_triangle,
    write_arrays,
)
from uoe_jax.compress.statistics import SYMMETRIC, LayerStatistics, observe
from uoe_jax.config import ModelConfig, config_hash
from uoe_jax.data.progress import note
from uoe_jax.errors import ConfigError, DataError, NonFiniteError
from uoe_jax.model import with_params
from uoe_jax.runs.probe import in_float32
from uoe_jax.tree import Arrays

STATISTICS = "statistics.safetensors"  # in the folder of the run that was observed
_FORMAT = 2  # 2: with what the head reads
# What statistics are of, and how a reader is told that they are of another one.
_NAMES = {
    "format": "another version",
    "tokenizer": "another tokenizer",
    "model": "another model",
    "weights": "another checkpoint",
    "calibration": "another calibration text",
}


def describe_statistics(
    model: ModelConfig,
    params: Arrays,
    buffers: Arrays,
    batch: Mapping[str, np.ndarray],
    tokenizer: str | None,
) -> dict[str, Any]:
    """Return what statistics depend on: hashes of the model, its weights, the text."""
    return {
        "format": _FORMAT,
        "tokenizer": tokenizer,
        "model": config_hash(in_float32(model)),
        "weights": digest_arrays({**params, **buffers}),
        "calibration": digest_arrays({k: np.asarray(v) for k, v in batch.items()}),
    }


def stored_statistics(
    file: Path,
    model: ModelConfig,
    arrays: tuple[Arrays, Arrays],
    batch: Mapping[str, np.ndarray],
    tokenizer: str | None,
    *,
    given: bool,
) -> tuple[LayerStatistics, ...]:
    """Return each layer's statistics, read from a file or observed and put there.

    `arrays` are parameters and buffers. A file that is of another model, checkpoint,
    tokenizer or text is replaced, with a line that says so; one that was `given` isn't.

    Raises ConfigError or DataError for a given file that is of something else, or that
    has no folder; NonFiniteError for a model that doesn't compute numbers.
    """
    if given and not file.parent.is_dir():  # rather now than when all is observed
        raise ConfigError(
            f"--statistics {file} can't be written (there is no folder {file.parent}); "
            "give another file, or make the folder"
        )
    if given and file.is_dir():
        raise ConfigError(
            f"--statistics {file} is a folder; give a file, such as {file / STATISTICS}"
        )
    wanted = describe_statistics(model, *arrays, batch, tokenizer)
    if file.exists():
        try:
            return read_statistics(file, wanted, model.num_layers)
        except (ConfigError, DataError) as error:
            if given:
                raise type(error)(f"{error}; give another --statistics") from None
            note(f"compress: {error}: observing again")
    model = in_float32(model)
    note(f"compress: observing what {model.num_layers} layers do")
    mesh = data_mesh(len(next(iter(batch.values()))))
    seen = observe(with_params(model, *arrays), batch, mesh=mesh)
    _check_finite(seen)
    try:
        write_arrays(file, _as_arrays(seen), wanted)
    except OSError as error:
        reason = error.strerror or error
        if given:
            raise ConfigError(
                f"--statistics {file} can't be written ({reason}); give another file"
            ) from None
        note(f"compress: {file} can't be written ({reason}): the next cut observes "
             "again")  # fmt: skip
    return seen


def read_statistics(
    file: Path, wanted: Mapping[str, Any], layers: int
) -> tuple[LayerStatistics, ...]:
    """Return the statistics of a file.

    Raises ConfigError if they are of something else than `wanted`, DataError if the
    file is damaged.
    """
    about = read_about(file)
    for name, words in _NAMES.items():
        if about.get(name) != wanted[name]:
            raise ConfigError(f"{file} holds statistics of {words}")
    arrays = read_arrays(file)
    found = []
    for layer in range(layers):
        names = {f"{layer}.{name}": name for name in LayerStatistics._fields}
        if missing := names.keys() - arrays.keys():
            raise DataError(f"{file} has no {min(missing)}")
        own = {name: arrays[key] for key, name in names.items()}
        for name in SYMMETRIC:
            own[name] = from_triangle(own[name], symmetric=True)
        found.append(LayerStatistics(**own))
    return tuple(found)


def _check_finite(seen: Sequence[LayerStatistics]) -> None:
    """Raise NonFiniteError for sums that no method can read."""
    for number, layer in enumerate(seen):
        for name, array in layer._asdict().items():
            if not np.isfinite(array).all():
                raise NonFiniteError(
                    f"layer {number} has values that aren't finite on the calibration "
                    f"text ({name}); compress a checkpoint from before it diverged"
                )


def _as_arrays(seen: Sequence[LayerStatistics]) -> Arrays:
    found = {}
    for number, layer in enumerate(seen):
        for name, array in layer._asdict().items():
            whole = to_triangle(array) if name in SYMMETRIC else array
            found[f"{number}.{name}"] = whole
    return found
