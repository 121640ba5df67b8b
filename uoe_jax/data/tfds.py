"""TensorFlow Datasets read without TensorFlow, through `tfds.data_source`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from uoe_jax.config import DataConfig
from uoe_jax.data.arrays import ArraySource, Pairs, check_labels
from uoe_jax.data.files import SourceFile
from uoe_jax.data.text import Document, TextSource, limit_bytes
from uoe_jax.errors import DataError, extra_packages, nearest

_SPLIT_NAMES = {
    "train": "train",
    "valid": "valid",
    "validation": "valid",
    "dev": "valid",
    "test": "test",
}


def tfds_source(config: DataConfig, kind: str) -> TextSource | ArraySource:
    """Return a TFDS dataset, built first if it isn't (which may need the network).

    Args:
      config: `path` is the name, with or without "tfds:" in front; `data_dir` the
        folder of built datasets.
      kind: the model's kind; "vision" reads images, the others text.
    """
    builder = _open_builder(config)
    splits: dict[str, str] = {}
    for given in builder.info.splits:
        if _SPLIT_NAMES.get(given):
            splits.setdefault(_SPLIT_NAMES[given], given)
    name = f"tfds:{builder.info.full_name}"
    if "train" not in splits:
        raise DataError(
            f"{name} has splits {', '.join(builder.info.splits)}; it needs train"
        )
    files = tuple(
        SourceFile(filename, Path(builder.data_path) / filename)
        for split in splits.values()
        for filename in sorted(builder.info.splits[split].filenames)
    )
    if kind == "vision":
        image = _find_feature(builder, "Image", "image", name)
        label = _find_feature(builder, "ClassLabel", "label", name)
        load = lambda: _load_images(builder, splits, image, label)
        return ArraySource(name, files, config, load)
    text = _find_feature(builder, "Text", config.text_key, name)
    label = ""
    if kind == "encoder":
        label = _find_feature(builder, "ClassLabel", "label", name)
    return TfdsTextSource(
        name, files, config, kind == "encoder", builder, splits, (text, label)
    )


def _open_builder(config: DataConfig) -> Any:
    with extra_packages():
        import tensorflow_datasets as tfds
    name = (config.path or "").removeprefix("tfds:")
    folder = config.data_dir or str(tfds.core.constants.DATA_PATH)
    try:
        builder = tfds.builder(name, data_dir=config.data_dir, try_gcs=False)
        if not builder.is_prepared():
            builder = _build_dataset(tfds, name, config)
        builder.as_data_source(split=next(iter(builder.info.splits)))
    except tfds.core.registered.DatasetNotFoundError:
        known = [p.name for p in Path(folder).glob("*") if p.is_dir()]
        known += tfds.list_builders(with_community_datasets=False)
        hint = nearest(name, known)
        if hint.startswith("known"):
            hint = "tfds.list_builders() lists them"
        raise DataError(f"no TFDS dataset {name!r} in {folder}; {hint}") from None
    except Exception as error:
        raise DataError(
            f"tfds:{name} can't be built or read in {folder} ({_line(error)}); "
            "build it with file_format='array_record' and set data.data_dir"
        ) from None
    return builder


def _build_dataset(tfds: Any, name: str, config: DataConfig) -> Any:
    """Download and build a dataset in the one format that needs no TensorFlow."""
    builder = tfds.builder(
        name, data_dir=config.data_dir, try_gcs=False, file_format="array_record"
    )
    quiet = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=quiet)
    return builder


def _line(error: Exception) -> str:
    """Return the first line of a message, shortened."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]


def _find_feature(builder: Any, kind: str, wanted: str, name: str) -> str:
    """Return the feature called `wanted`, else the only one of its kind."""
    features = builder.info.features
    features = dict(features) if hasattr(features, "keys") else {}
    found = [k for k, v in features.items() if type(v).__name__ == kind]
    if wanted in found:
        return wanted
    if len(found) == 1:
        return found[0]
    shown = ", ".join(f"{k} ({type(v).__name__})" for k, v in sorted(features.items()))
    option = "; set data.text_key" if kind == "Text" and found else ""
    raise DataError(
        f"{name} has features {shown}; it needs one {kind} named {wanted!r}{option}"
    )


@dataclass(frozen=True)
class TfdsTextSource(TextSource):
    """Text features of a TFDS dataset; a missing split is taken from train by hash."""

    builder: Any = None
    splits: dict[str, str] = field(default_factory=dict)
    keys: tuple[str, str] = ("text", "label")

    def documents(self) -> Iterator[Document]:
        """Yield every example that isn't empty."""
        return limit_bytes(self._examples(), self.config.max_bytes)

    def _examples(self) -> Iterator[Document]:
        text_key, label_key = self.keys
        for split, given in self.splits.items():
            examples = self.builder.as_data_source(split=given)
            for index in range(len(examples)):
                example = _read_example(
                    examples, index, self.keys, f"{self.name} {given}"
                )
                text = example[text_key]
                data = text.encode() if isinstance(text, str) else bytes(text)
                label = int(example[label_key]) if self.labelled else None
                own = None if split == "train" else split
                if data and (label is None or label >= 0):  # -1: label kept secret
                    name = f"{self.name} {given} example {index}"
                    yield Document(name, data, split=own, label=label)


def _read_example(examples: Any, index: int, keys: tuple[str, ...], where: str) -> Any:
    """Return an example; raise DataError if its record is damaged.

    A truncated record file opens without complaint and gives empty examples.
    """
    try:
        example = examples[index]
    except Exception as error:
        reason = _line(error)
    else:
        empty = [key for key in keys if key and example.get(key) is None]
        if not empty:
            return example
        reason = f"no {empty[0]} in it"
    raise DataError(
        f"{where} example {index} can't be read ({reason}); build the dataset again"
    )


def _load_images(builder: Any, splits: dict[str, str], image: str, label: str) -> Pairs:
    """Return images and labels by split, read into memory."""
    result: Pairs = {}
    for split, given in splits.items():
        examples = builder.as_data_source(split=given)
        where = f"tfds:{builder.info.full_name} {given}"
        rows = [
            _read_example(examples, i, (image, label), where)
            for i in range(len(examples))
        ]
        rows = [row for row in rows if row[label] >= 0]  # -1: label kept secret
        if not rows:
            continue
        shapes = {r[image].shape for r in rows}
        if len(shapes) > 1:
            raise DataError(
                f"{where} has images of {len(shapes)} sizes; they must be of one size"
            )
        labels = check_labels(np.array([int(r[label]) for r in rows]), where)
        result[split] = (np.stack([r[image] for r in rows]), labels)
    return result
