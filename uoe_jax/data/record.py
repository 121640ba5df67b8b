"""What a run keeps of its data: the tokenizer, its hash and the hash of the data.

It lies in the run's folder, so that reading the run needs neither the data nor a
cache, and so that other data under the same path isn't taken for the run's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from uoe_jax.config import DataConfig, ExperimentConfig
from uoe_jax.data.chat import CHAT, read_template
from uoe_jax.data.mix import member_configs
from uoe_jax.data.prepare import Prepared, find_prepared
from uoe_jax.data.source import resolve
from uoe_jax.data.store import hash_outputs
from uoe_jax.data.tokenize import (
    Tokenizer,
    is_file_tokenizer,
    load_tokenizer,
    make_tokenizer,
    no_tokenizer_in,
)
from uoe_jax.errors import ConfigError, DataError, nearest, shown
from uoe_jax.fields import INT32_MAX, convert
from uoe_jax.files import format_json, read_json, write_atomically

RECORD, TOKENIZER = "data.json", "tokenizer.json"
_OLD_RECORD = "env.json"  # which in older runs holds the hash, under "data"
# What a manifest says that a run keeps; the list of sources may be long.
_KEPT = ("hash", "source", "path", "kind", "settings", "tokenizer", "classes")
_LISTS = ("classes", "earlier")
# What may stand in a record, and of which type; in `_LISTS` of each of their items.
_HELD: dict[str, Any] = {
    "hash": str | None,
    "source": str,
    "path": str | None,
    "kind": Literal["text", "rows", "images"],
    "settings": dict[str, Any],
    "tokenizer": dict[str, Any] | None,  # None: of images
    "classes": str,
    "arrays": str | None,
    "tokenizer_sha256": str,
    "earlier": str | None,
}
# Options that say how rows are made and where things lie, not what the data is.
_READING = ("batch_size", "seq_len", "pack", "seed", "cache_dir", "allow_changed")


@dataclass(frozen=True)
class DataRecord:
    """The data of a run: its hashes, and the texts of its tokenizer.json and chat.json.

    `content` holds what the prepared data's manifest said, `arrays` (the hash of the
    prepared arrays alone), and `tokenizer_sha256`.
    """

    content: dict[str, Any]
    tokenizer_text: str | None = None
    chat_text: str | None = None  # of conversations, or of a model that chats

    @property
    def hash(self) -> str | None:
        """Return the manifest's hash; None where an old run has none."""
        return self.content.get("hash")

    @property
    def tokenizer_identity(self) -> str | None:
        """Return what tells tokenizers apart, a hash or a name; None without one."""
        return _tokenizer_identity(self.content)

    def tokenizer(self) -> Tokenizer | None:
        """Return the run's tokenizer; None for images."""
        entry = self.content.get("tokenizer")
        return None if entry is None else make_tokenizer(entry, self.tokenizer_text)

    def holds(self, prepared: Prepared) -> bool:
        """Whether prepared data is the recorded data, under whatever name it lies."""
        return self.same_data(record_of(prepared))

    def same_data(self, other: DataRecord) -> bool:
        """Whether two records are of the same data."""
        if self.hash is None or self.hash == other.hash:
            return True
        arrays = self.content.get("arrays")
        return arrays is not None and arrays == other.content.get("arrays")

    def moved_fields(self, other: DataRecord) -> set[str]:
        """Return the config's fields that may differ, as the same files lie elsewhere.

        The tokenizer by its content, the data by its hash.
        """
        mine = self.content.get("tokenizer_sha256")
        tokenizer = mine is not None and mine == other.content.get("tokenizer_sha256")
        fields = {"data.tokenizer", "data.bpe_vocab_size"} if tokenizer else set()
        if self.chat_text is not None and self.chat_text == other.chat_text:
            fields.add("data.chat_template")
        return fields | ({"data.path"} if self.same_data(other) else set())

    def followed_by(self, other: DataRecord, run_dir: Path, accept: bool) -> DataRecord:
        """Return the record of a run that goes on, by default on the same data only.

        Accepted other data keeps the hashes of what the run had seen before. A
        tokenizer that differs is never accepted: its ids mean other words.
        """
        earlier = self.content.get("earlier", [])
        if not self.same_data(other):
            _refuse(self, other, run_dir, accept)
            earlier = [*earlier, self.hash]
        more = {"earlier": earlier} if earlier else {}
        return dataclasses.replace(other, content=other.content | more)


def record_of(prepared: Prepared) -> DataRecord:
    """Return what a run keeps of prepared data."""
    manifest = prepared.manifest
    content = {key: manifest[key] for key in _KEPT if key in manifest}
    content["arrays"] = hash_outputs(manifest)
    file, chat = prepared.folder / TOKENIZER, prepared.chat_text()
    if not file.is_file():
        return DataRecord(content, chat_text=chat)
    text = file.read_text("utf-8")
    return DataRecord(content | {"tokenizer_sha256": _digest(text)}, text, chat)


def record_of_tokenizer(text: str | None) -> DataRecord:
    """Return what a run keeps whose model came without its data.

    `text` is that of a tokenizer.json; None where the model takes bytes. Any data that
    is prepared with this tokenizer is the run's.
    """
    if text is None:
        return DataRecord({"hash": None, "tokenizer": {"name": "byte"}})
    make_tokenizer({"name": TOKENIZER}, text)  # refuses what isn't one
    content = {"hash": None, "tokenizer": {"name": TOKENIZER}}
    return DataRecord(content | {"tokenizer_sha256": _digest(text)}, text)


def write_record(run_dir: Path, record: DataRecord) -> None:
    """Write a record into a run's folder, the tokenizer first."""
    if record.tokenizer_text is not None:
        write_atomically(run_dir / TOKENIZER, record.tokenizer_text)
    if record.chat_text is not None:
        write_atomically(run_dir / CHAT, record.chat_text)
    write_atomically(run_dir / RECORD, format_json(record.content, indent=2) + "\n")


def read_record(run_dir: Path) -> DataRecord | None:
    """Return what a run recorded of its data; None if it recorded nothing.

    Of an older run that is the hash in its env.json. Raises DataError if the record is
    damaged or its tokenizer isn't the one that was recorded.
    """
    file = run_dir / RECORD
    if not os.path.lexists(file):
        return _read_old(run_dir)
    try:
        content = read_json(file)
    except OSError as error:
        raise DataError(f"{file} can't be read ({error.strerror})") from None
    if broken := _broken(content):
        raise DataError(f"{file} is damaged ({broken}); restore the file")
    chat = _read_copy(run_dir / CHAT) if (run_dir / CHAT).is_file() else None
    if "tokenizer_sha256" not in content:
        return DataRecord(content, chat_text=chat)
    copy = run_dir / TOKENIZER
    text = _read_copy(copy)
    if _digest(text) != content["tokenizer_sha256"]:
        raise DataError(
            f"{copy} isn't the tokenizer the run was trained with (its SHA-256 is "
            "another); restore the file"
        )
    return DataRecord(content, text, chat)


def _read_copy(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{file} can't be read ({reason}); restore the file") from None


def _broken(content: Any) -> str | None:
    """Return in words what makes a record unreadable; None for a whole one."""
    if not isinstance(content, dict):
        return "it is no JSON object"
    if missing := [key for key in ("hash", "tokenizer") if key not in content]:
        return f"it has no {missing[0]}"
    for key, value in content.items():
        if key not in _HELD:
            return f"it has the field {shown(key)}; {nearest(key, _HELD)}"
        if key in _LISTS and not isinstance(value, list):
            return f"{key} is {shown(value)}; expected a list"
        try:
            for item in value if key in _LISTS else [value]:
                convert(_HELD[key], item, key)
        except ConfigError as error:
            return str(error)
    return None if content["tokenizer"] is None else _broken_entry(content["tokenizer"])


def _broken_entry(entry: dict[str, Any]) -> str | None:
    """Return in words what makes a tokenizer's entry unreadable, if anything."""
    name, size = entry.get("name"), entry.get("vocab_size")
    if not isinstance(name, str):
        return "its tokenizer has no name"
    whole = type(size) is int and 0 < size <= INT32_MAX
    # Of a tokenizer in a file the file says the rest.
    if not (whole or (size is None and name != "ids")):
        return f"its tokenizer has the vocab_size {shown(size)}"
    if name == "byte" and size not in (None, 256):
        return f"its tokenizer of bytes has the vocab_size {size}; bytes are 256"
    return None


def _read_old(run_dir: Path) -> DataRecord | None:
    try:
        recorded = read_json(run_dir / _OLD_RECORD).get("data")
    except (OSError, ValueError, AttributeError):
        return None
    return DataRecord({"hash": recorded}) if isinstance(recorded, str) else None


def run_tokenizer(run_dir: Path, config: ExperimentConfig) -> Tokenizer:
    """Return a run's tokenizer, without its data.

    A run that was written before tokenizers were kept gets the tokenizer.json in its
    folder, the file its config names, or that of its prepared data, if this is still
    what it recorded. Raises DataError if there is none, or for a run on images.
    """
    record = read_record(run_dir)
    if record is not None and "tokenizer" in record.content:
        tokenizer = record.tokenizer()
        if tokenizer is None:
            raise DataError(f"{run_dir} was trained on images; they have no text")
        return tokenizer
    copy = run_dir / TOKENIZER
    if copy.is_file():
        return make_tokenizer({"name": TOKENIZER}, _read_copy(copy))
    prepared = find_prepared(config)
    if prepared is not None and (record is None or record.holds(prepared)):
        return prepared.tokenizer()
    if config.data.tokenizer == "byte" and not _maybe_ids(config.data):
        return make_tokenizer({"name": "byte"}, None)
    if is_file_tokenizer(config.data.tokenizer) and not _maybe_ids(config.data):
        if config.data.tokenizer == str(copy.absolute()):  # of an import
            raise DataError(no_tokenizer_in(run_dir))
        return load_tokenizer(config.data.tokenizer)
    raise _no_tokenizer(run_dir)


def _maybe_ids(data: DataConfig) -> bool:
    """Whether a config's data may be token ids, whose tokenizer is no field of it."""
    return data.source == "npz" or (data.path or "").endswith((".npz", ".npy"))


def check_recorded(
    record: DataRecord | None, prepared: Prepared, run_dir: Path, *, accept: bool
) -> None:
    """Raise DataError if prepared data isn't the run's; `accept` takes other data."""
    if record is not None and not record.holds(prepared):
        _refuse(record, record_of(prepared), run_dir, accept)


def _refuse(record: DataRecord, other: DataRecord, run_dir: Path, accept: bool) -> None:
    """Raise DataError for another tokenizer, and for other data unless accepted."""
    ours, source = _tokenizer_identity(record.content), other.content["source"]
    if ours not in (None, _tokenizer_identity(other.content)):
        fix = f"set --data.tokenizer {run_dir / TOKENIZER}"
        if "tokenizer_sha256" not in record.content:
            fix = f"the run's is {ours!r}"
        raise DataError(
            f"{source} was prepared with another tokenizer than {run_dir} was trained "
            f"with; {fix}"
        )
    if not accept:
        raise DataError(
            f"{source} isn't the data that {run_dir} was trained on (its hash is "
            f"{str(other.hash)[:12]}, the run's {str(record.hash)[:12]}); restore it, "
            "or accept it with --data.allow-changed"
        )


def _tokenizer_identity(content: dict[str, Any]) -> str | None:
    entry = content.get("tokenizer") or {}
    return content.get("tokenizer_sha256") or entry.get("name")


def other_data(config: ExperimentConfig, data: DataConfig) -> bool:
    """Whether `data` asks for other examples than a run's config does."""
    same = {name: getattr(config.data, name) for name in _READING}
    return dataclasses.replace(data, **same) != config.data


def with_run_tokenizer(
    config: ExperimentConfig, data: DataConfig, run_dir: Path
) -> DataConfig:
    """Return options whose tokenizer and chat template are those of a run.

    Other text would else get a vocabulary of its own, or one that a path no longer
    names. Raises DataError where an older run kept none and needs it.
    """
    data = _with_run_template(config, data, run_dir)
    if data.tokenizer != config.data.tokenizer or not _has_file(data):
        return data
    for copy in (run_dir / TOKENIZER, _prepared_tokenizer(config, run_dir)):
        if copy is not None and copy.is_file():
            return dataclasses.replace(data, tokenizer=str(copy.absolute()))
    if data.tokenizer == "bpe":
        raise _no_tokenizer(run_dir)
    return data


def _with_run_template(
    config: ExperimentConfig, data: DataConfig, run_dir: Path
) -> DataConfig:
    """Return options that write messages as a run's model knows them."""
    if data.chat_template != config.data.chat_template or not _holds_records(data):
        return data
    if read_template(run_dir) is None:
        return data
    return dataclasses.replace(data, chat_template=str(run_dir.absolute()))


def _holds_records(data: DataConfig) -> bool:
    try:
        parts = member_configs(data) if data.mix else [data]
        return any(resolve(part, "decoder") in ("jsonl", "parquet") for part in parts)
    except (DataError, OSError):  # reading it will say so
        return False


def is_moved(data: DataConfig) -> bool:
    """Whether files that go with a run aren't where its config says."""
    tokenizer, chat = data.tokenizer, data.chat_template
    gone = is_file_tokenizer(tokenizer) and not Path(tokenizer).is_file()
    return gone or (chat is not None and not Path(chat).exists())


def _has_file(data: DataConfig) -> bool:
    return data.tokenizer == "bpe" or is_file_tokenizer(data.tokenizer)


def _prepared_tokenizer(config: ExperimentConfig, run_dir: Path) -> Path | None:
    prepared, record = find_prepared(config), read_record(run_dir)
    if prepared is None or not (record is None or record.holds(prepared)):
        return None
    return prepared.folder / TOKENIZER


def carried_record(run_dir: Path, config: ExperimentConfig) -> DataRecord | None:
    """Return what a run that is made of another one keeps of its data.

    Of an older run, whose record is its hash only, what its prepared data still says.
    """
    record = read_record(run_dir)
    if record is not None and "tokenizer" in record.content:
        if record.chat_text is None and (template := read_template(run_dir)):
            record = dataclasses.replace(record, chat_text=template.to_json())
        return record
    prepared = find_prepared(config)
    if prepared is not None and (record is None or record.holds(prepared)):
        return record_of(prepared)
    return None


def _no_tokenizer(run_dir: Path) -> DataError:
    return DataError(
        f"{run_dir} holds no tokenizer, as runs of older versions, and the data it was "
        f"prepared from isn't there unchanged; put the {TOKENIZER} it was trained with "
        "into the run's folder"
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
