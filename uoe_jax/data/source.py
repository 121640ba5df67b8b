"""From a DataConfig to a source: built-in, local or TFDS."""

from __future__ import annotations

from uoe_jax.config import DataConfig
from uoe_jax.data.arrays import ArraySource, digits_source, npz_source
from uoe_jax.data.files import SourceFile, content_suffix, expand
from uoe_jax.data.options import check_used
from uoe_jax.data.tasks.source import TASKS, task_source
from uoe_jax.data.text import (
    MANY_FILES,
    FileSource,
    JsonlSource,
    RangeSource,
    TextSource,
    stdlib_files,
)
from uoe_jax.data.tfds import tfds_source
from uoe_jax.errors import DataError

Source = TextSource | ArraySource

_JSONL = {".jsonl", ".ndjson"}
_ARRAYS = {".npz", ".npy"}


def make_source(config: DataConfig, kind: str) -> Source:
    """Return where a model of this kind gets its data; raise DataError if nowhere.

    "auto" takes the built-in data of the kind without a path, else goes by the path:
    "tfds:NAME", .jsonl, .npz, anything else as text.
    """
    source = resolve(config, kind)
    check_used(config, source, kind)
    if source == "stdlib":
        made: Source = FileSource("stdlib", stdlib_files(), config)
    elif source == "digits":
        made = digits_source(config)
    elif source in TASKS:
        made = task_source(source, config)
    elif config.path is None:
        raise DataError(f"data.source is {source!r} without data.path; set data.path")
    elif source == "tfds":
        made = tfds_source(config, kind)
    else:
        files = tuple(expand(config.path))
        if source == "npz":
            made = npz_source(files, config)
        elif source == "jsonl":
            made = JsonlSource(_label(files, config), files, config, kind == "encoder")
        else:
            cls = FileSource if len(files) >= MANY_FILES else RangeSource
            made = cls(_label(files, config), files, config)
    _check_kind(made, kind)
    return made


def resolve(config: DataConfig, kind: str) -> str:
    """Return the source that "auto" stands for, or the one that is named."""
    if config.source != "auto":
        return config.source
    if config.path is None:
        return "digits" if kind == "vision" else "stdlib"
    if config.path.startswith("tfds:"):
        return "tfds"
    suffixes = {content_suffix(f.path) for f in expand(config.path)}
    if suffixes <= _JSONL:
        return "jsonl"
    if suffixes <= _ARRAYS:
        return "npz"
    return "text"


def _label(files: tuple[SourceFile, ...], config: DataConfig) -> str:
    return files[0].name if len(files) == 1 else str(config.path)


def _check_kind(source: Source, kind: str) -> None:
    """Refuse text for images and text without labels for an encoder."""
    if isinstance(source, TextSource):
        if kind == "vision":
            raise DataError(
                f"{source.name} holds text but model.kind is 'vision'; use digits, "
                "an .npz of images or tfds"
            )
        if kind == "encoder" and not source.labelled:
            raise DataError(
                f"{source.name} has no labels but model.kind is 'encoder'; use a "
                ".jsonl with a label field, an .npz with labels or tfds"
            )
