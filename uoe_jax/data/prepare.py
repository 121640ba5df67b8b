"""Sources tokenized once into memory-mapped arrays with a manifest of hashes."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uoe_jax.config import DataConfig, ExperimentConfig
from uoe_jax.data.arrays import ArraySource
from uoe_jax.data.chat import CHAT, configured_template
from uoe_jax.data.files import fingerprint, sha256_file
from uoe_jax.data.mix import MixSource, member_configs
from uoe_jax.data.progress import note
from uoe_jax.data.shared import bring, one_at_a_time, send
from uoe_jax.data.source import Source, make_source
from uoe_jax.data.store import (
    STAMPS,
    build_folder,
    find_change,
    find_damage,
    load_array,
    read_manifest,
    remove_abandoned,
    write_manifest,
    write_stamps,
)
from uoe_jax.data.tasks.source import TASKS, task_options
from uoe_jax.data.tokenize import (
    Tokenizer,
    hub_name,
    is_file_tokenizer,
    make_tokenizer,
    tokenizer_file,
)
from uoe_jax.data.write_arrays import write_arrays
from uoe_jax.data.write_text import write_text
from uoe_jax.errors import DataError
from uoe_jax.files import format_json, user_cache
from uoe_jax.mixture import read_mix
from uoe_jax.stores.objects import StoreError, address_of

# Of the prepared folder; another format is prepared again. Format 1 took some files
# (UTF-16, archives, JSON under other endings) for bytes.
FORMAT = 2


@dataclass(frozen=True)
class Prepared:
    """A folder of prepared arrays and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def kind(self) -> str:
        """Return "text", "rows" (labelled token rows) or "images"."""
        return self.manifest["kind"]

    def array(self, split: str, name: str) -> np.ndarray:
        """Return an array such as `train` `tokens`, memory-mapped.

        Raises DataError if its file isn't what the manifest says: reading a map beyond
        the end of a file kills the process.
        """
        file = f"{split}_{name}.npy"
        entry = {"outputs": {file: self.manifest["outputs"][file]}}
        if damage := find_damage(self.folder, entry):
            raise DataError(
                f"{self.folder}: {damage}; run the command again to prepare it anew"
            )
        return load_array(self.folder / file)

    def optional_array(self, split: str, name: str) -> np.ndarray | None:
        """Return an array that not all data has, as `array` does; None without it."""
        has = f"{split}_{name}.npy" in self.manifest["outputs"]
        return self.array(split, name) if has else None

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer the arrays were made with."""
        file = self.folder / "tokenizer.json"
        text = file.read_text("utf-8") if file.is_file() else None
        return make_tokenizer(self.manifest["tokenizer"], text)

    def chat_text(self) -> str | None:
        """Return the chat.json of data that holds conversations; None of other data."""
        file = self.folder / CHAT
        return file.read_text("utf-8") if file.is_file() else None


def prepare(config: ExperimentConfig, *, thorough: bool = False) -> Prepared:
    """Return the prepared data of an experiment, preparing it if need be.

    What is there is used again if sources and arrays are what its manifest says.
    A changed source raises DataError unless `data.allow_changed`, which prepares it
    again; damaged arrays are prepared again. `thorough` hashes every array instead of
    trusting unchanged file times.
    """
    data, kind = config.data, config.model.kind
    remove_abandoned(_cache_folder(data))
    try:
        source = make_source(data, kind)
    except DataError:
        found = find_prepared(config) if address_of(data.cache_dir) else None
        if found is None:
            raise
        note(f"{data.path or 'the data'} isn't here: taken as another machine's")
        return found
    settings = _settings(data, kind)
    members = source.members if isinstance(source, MixSource) else [source]
    folder = _folder(members, settings, data)
    bring(folder, data, source.name)
    found, _ = _usable(folder, source, data, thorough)
    if found is not None:
        return found
    with one_at_a_time(folder, source.name):
        # Which another process may have made meanwhile.
        found, problem = _usable(folder, source, data, thorough)
        if found is not None:
            return found
        if problem:
            note(f"preparing {source.name} again: {problem}")
        with build_folder(folder, replace=folder.exists()) as building:
            manifest = _build(source, config, settings, building)
    send(folder, data)
    return Prepared(folder, manifest)


def _usable(
    folder: Path, source: Source, data: DataConfig, thorough: bool
) -> tuple[Prepared | None, str]:
    """Return what a folder holds if it is whole and the source's, else None and why.

    Raises DataError for a source that has changed, unless that is allowed.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None, "its manifest is damaged or old" if folder.exists() else ""
    if manifest["format"] != FORMAT:
        return None, ""
    changed = find_change(folder, manifest, source.files)
    if changed and not data.allow_changed:
        raise DataError(
            f"{source.name} changed since it was prepared ({changed}); restore it "
            "or accept it with --data.allow-changed"
        )
    problem = changed or find_damage(folder, manifest, thorough=thorough)
    if problem:
        return None, problem
    if not (folder / STAMPS).exists():  # as it was fetched
        with suppress(OSError):  # whoever reads may not write there
            write_stamps(folder, manifest, source.files)
    return Prepared(folder, manifest), ""


def find_prepared(config: ExperimentConfig) -> Prepared | None:
    """Return data that was prepared before and is intact, even without its source."""
    data, kind = config.data, config.model.kind
    try:
        parts = member_configs(data) if data.mix else [data]
        built_in = [make_source(part, kind) for part in parts if part.path is None]
        folder = _folder(built_in, _settings(data, kind), data)
        bring(folder, data, folder.name)
        manifest = read_manifest(folder)
        if manifest is None or manifest["format"] != FORMAT:
            return None
        return None if find_damage(folder, manifest) else Prepared(folder, manifest)
    except (DataError, OSError, StoreError):
        return None


def _build(
    source: Source, config: ExperimentConfig, settings: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Write all arrays and the manifest into `folder`; return the manifest."""
    if isinstance(source, ArraySource):
        written = write_arrays(source, config.model.kind, folder)
    else:
        written = write_text(source, config.data, folder)
    manifest = {
        "format": FORMAT,
        "source": source.name,
        "path": _place(config.data),
        "settings": settings,
        **written,
    }
    return write_manifest(folder, manifest, source.files)


def _settings(data: DataConfig, kind: str) -> dict[str, Any]:
    """Return the options that the content of the arrays depends on."""
    tokenizer = data.tokenizer
    if is_file_tokenizer(tokenizer) and tokenizer_file(tokenizer).is_file():
        tokenizer = "sha256:" + sha256_file(tokenizer_file(tokenizer))
    # Only where there is one, so that other folders keep their names.
    more: dict[str, Any] = {}
    if data.source in TASKS:
        more["task"] = task_options(data)
    if template := configured_template(data.chat_template):
        digest = hashlib.sha256(template.to_json().encode()).hexdigest()
        more["chat_template"] = f"sha256:{digest}"
    for name in ("encoding", "bad_records"):
        if getattr(data, name) != getattr(DataConfig(), name):
            more[name] = getattr(data, name)
    return more | {
        "use": {"decoder": "text", "encoder": "rows", "vision": "images"}[kind],
        "tokenizer": tokenizer,
        "bpe_vocab_size": data.bpe_vocab_size if tokenizer == "bpe" else None,
        "text_key": data.text_key,
        "bad_utf8": data.bad_utf8,
        "valid_fraction": data.valid_fraction,
        "test_fraction": data.test_fraction,
        "max_bytes": data.max_bytes,
    }


def _folder(
    sources: Sequence[Source], settings: dict[str, Any], data: DataConfig
) -> Path:
    """Return where data goes; one path with one set of options always gets the same.

    Of `sources`, which may all be known by their paths, those without one are needed.

    The standard library has no path: other content, as of another Python, has another
    folder, so that Pythons share a cache.
    """
    place: list[Any] = [data.source, _place(data), absolute_paths(data).data_dir]
    if data.mix:  # whatever the weights
        place += [_place(part) for part in member_configs(data)]
    place += [fingerprint(s.files) for s in sources if s.name == "stdlib"]
    digest = hashlib.sha256(format_json([settings, place], sort_keys=True).encode())
    shown = Path(data.path).name if data.path else ""
    if data.mix:
        shown = "-".join(Path(share.path).name for share in read_mix(data.mix))
    elif not data.path:
        shown = sources[0].name
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", shown).strip("-.")[-40:] or "data"
    return _cache_folder(data) / f"{readable}-{digest.hexdigest()[:12]}"


def absolute_paths(data: DataConfig) -> DataConfig:
    """Return options that mean the same files from every working folder."""
    change: dict[str, Any] = {"path": _place(data)}
    if data.mix:
        shares = zip(read_mix(data.mix), member_configs(data), strict=True)
        places = [(_place(part) or "stdlib", share.weight) for share, part in shares]
        change["mix"] = tuple(f"{place}={weight!r}" for place, weight in places)
    for name in ("data_dir", "cache_dir", "chat_template"):
        given = getattr(data, name)
        if given is not None and address_of(given) is None:
            change[name] = str(Path(given).expanduser().absolute())
    if is_file_tokenizer(data.tokenizer) and not hub_name(data.tokenizer):
        change["tokenizer"] = str(Path(data.tokenizer).expanduser().absolute())
    return dataclasses.replace(data, **change)


def _place(data: DataConfig) -> str | None:
    """Return the absolute path, which for TFDS is the name as given."""
    if data.path is None or data.source == "tfds" or data.path.startswith("tfds:"):
        return data.path
    return str(Path(data.path).expanduser().absolute())


def _cache_folder(data: DataConfig) -> Path:
    """Return where prepared data goes: data.cache_dir or the user's cache.

    What comes from a store, and goes there, lies in the user's cache too.
    """
    if data.cache_dir is not None and address_of(data.cache_dir) is None:
        return Path(data.cache_dir).expanduser()
    return user_cache()
