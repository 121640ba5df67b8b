"""From a DataConfig to a source: built-in, local or TFDS."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from uoe_jax.config import DataConfig
from uoe_jax.data.arrays import ArraySource, digits_source, npz_source
from uoe_jax.data.files import SourceFile, expand
from uoe_jax.data.formats import choose_files, look
from uoe_jax.data.mix import member_configs, mix_sources
from uoe_jax.data.options import (
    OF_FORMATS,
    OF_PRESETS,
    check_used,
    check_written,
    share_options,
    used_options,
)
from uoe_jax.data.records import JsonSource, ParquetSource
from uoe_jax.data.tasks.source import OF_DECODERS, TASKS, task_source
from uoe_jax.data.text import (
    MANY_FILES,
    FileSource,
    RangeSource,
    TextSource,
    stdlib_files,
)
from uoe_jax.data.tfds import tfds_source
from uoe_jax.errors import DataError

Source = TextSource | ArraySource


def make_source(config: DataConfig, kind: str) -> Source:
    """Return where a model of this kind gets its data; raise DataError if nowhere.

    "auto" takes the built-in data of the kind without a path, else goes by the path:
    "tfds:NAME", JSON (lines or an array), Parquet, .npz, other texts.
    """
    source = resolve(config, kind)
    check_used(config, source, kind)
    if source == "stdlib":
        made: Source = FileSource("stdlib", stdlib_files(), config)
    elif source == "digits":
        made = digits_source(config)
    elif source in OF_DECODERS and kind != "decoder":
        raise DataError(
            f"{source} asks for next tokens but model.kind is {kind!r}; use model.kind "
            "decoder"
        )
    elif source in TASKS:
        made = task_source(source, config)
    elif source == "mix":
        made = mix_sources(
            [make_source(m, kind) for m in _members(config, kind)], config
        )
    elif config.path is None:
        raise DataError(f"data.source is {source!r} without data.path; set data.path")
    elif source == "tfds":
        made = tfds_source(config, kind)
    else:
        made = _file_source(source, config, kind == "encoder")
    _check_kind(made, kind)
    return made


def without_unread(
    data: DataConfig, kind: str, typed: Collection[str] = ()
) -> DataConfig:
    """Return a run's options as other data reads them, which needn't have its format.

    What isn't `typed` and what the data's source doesn't read gets its default. Raises
    DataError for data that isn't there.
    """
    used = used_options(data, resolve(data, kind), kind)
    if data.mix:
        parts = member_configs(data)
        read = [used_options(part, resolve(part, kind), kind) for part in parts]
        used = (used - OF_FORMATS) | set().union(*read)
    default = DataConfig()
    names = {field.name for field in dataclasses.fields(data)}
    gone = names - used - OF_PRESETS - set(typed)
    return dataclasses.replace(data, **{name: getattr(default, name) for name in gone})


def _members(config: DataConfig, kind: str) -> list[DataConfig]:
    """Return the options of a mixture's sources; each gets those that it reads.

    Raises ConfigError for an option that no source reads.
    """
    parts = member_configs(config)
    return share_options(config, parts, [resolve(part, kind) for part in parts], kind)


def _file_source(source: str, config: DataConfig, labelled: bool) -> Source:
    """Return the source of files of one kind."""
    files, path = tuple(expand(config.path or "")), str(config.path)
    if config.source == "auto":
        files = choose_files(files, path)[1]
    elif source != "text" and len(files) > 1:
        files = tuple(f for f in files if kind_of(f) == source) or files
    label = files[0].name if len(files) == 1 else path
    if source == "npz":
        return npz_source(files, config)
    if source == "jsonl":
        return JsonSource(label, files, config, labelled)
    if source == "parquet":
        return ParquetSource(label, files, config, labelled)
    cls = FileSource if len(files) >= MANY_FILES else RangeSource
    return cls(label, files, config)


def kind_of(file: SourceFile) -> str:
    """Return the source that reads a file."""
    kind = look(file.path).kind
    return "jsonl" if kind == "json" else kind


def resolve(config: DataConfig, kind: str) -> str:
    """Return the source that "auto" stands for, or the one that is named."""
    check_written(config)
    if config.mix:
        return "mix"
    if config.source != "auto":
        return config.source
    if config.path is None:
        return "digits" if kind == "vision" else "stdlib"
    if config.path.startswith("tfds:"):
        return "tfds"
    return choose_files(tuple(expand(config.path)), config.path)[0]


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
