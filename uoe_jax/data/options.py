"""Which data options a source reads: every option that is given is used or refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence

from uoe_jax.config import DataConfig
from uoe_jax.data.encoding import check_encoding
from uoe_jax.errors import ConfigError
from uoe_jax.mixture import check_mix

# How rows are drawn, where arrays lie: options of every source.
_ALWAYS = {"source", "batch_size", "cache_dir", "allow_changed", "seed"}
_SPLITS = {"valid_fraction", "test_fraction"}
_TOKENS = {"tokenizer", "bpe_vocab_size", "bad_utf8", "max_bytes"} | _SPLITS
_RECORDS = {"text_key", "bad_records", "chat_template"}
OF_FORMATS = _RECORDS | {"encoding", "data_dir"}  # of some sources alone
_TASK = {"num_examples"}
_USED = {
    "stdlib": _TOKENS,
    "text": _TOKENS | {"path", "encoding"},
    "jsonl": _TOKENS | {"path", "encoding"} | _RECORDS,
    "parquet": _TOKENS | {"path"} | _RECORDS,
    "tfds": _TOKENS | {"path", "data_dir", "text_key"},
    "mix": _TOKENS | {"mix"} | OF_FORMATS,
    "digits": _SPLITS,
    "npz": _SPLITS | {"path"},
    "listops": _TASK | {"min_length", "max_length"},
    "pathfinder": _TASK,
    "recall": _TASK | {"pairs"},
    "copying": _TASK,
}
# Presets give these with their model's vocabulary, whatever the data will be.
OF_PRESETS = {"tokenizer", "bpe_vocab_size", "seq_len", "pack"}


def used_options(data: DataConfig, source: str, kind: str) -> set[str]:
    """Return the fields of DataConfig that decide what this source gives a model."""
    used = _ALWAYS | _USED[source]
    if kind != "vision":
        used |= {"seq_len"}
    else:
        used -= {"text_key", "tokenizer", "bad_utf8", "max_bytes"}
    if kind != "decoder":
        used -= {"chat_template"}
    if kind == "decoder":
        used |= {"pack"}
    if data.tokenizer != "bpe" or "tokenizer" not in used:
        used -= {"bpe_vocab_size"}
    return used


def check_written(data: DataConfig) -> None:
    """Raise ConfigError for names that are empty and an encoding that isn't one."""
    names = ("path", "data_dir", "cache_dir", "tokenizer", "text_key", "encoding")
    for name in (*names, "chat_template"):
        value = getattr(data, name)
        if value is not None and not value.strip():
            raise ConfigError(f"data.{name} is empty; give it a value or leave it out")
    check_encoding(data.encoding)
    check_mix(data)


def check_used(
    data: DataConfig, source: str, kind: str, typed: Collection[str] = ()
) -> None:
    """Raise ConfigError for options that a source would ignore.

    Args:
      data: the options; those that differ from their defaults count as given.
      source: the source that `data` stands for.
      kind: the model's kind.
      typed: fields that were typed, whatever their value.
    """
    used = used_options(data, source, kind)
    ignored = [n for n in _given(data, typed) if n not in used]
    if not ignored:
        return
    name = ignored[0]
    value = getattr(data, name)
    readers = sorted(s for s in _USED if name in used_options(data, s, kind))
    fix = "leave it out"
    if name == "bpe_vocab_size" and "tokenizer" in used:
        fix = "leave it out (it goes with data.tokenizer bpe)"
    elif name == "path":
        fix = "set --data.source auto to read it, or leave it out"
    elif readers:
        fix = f"leave it out (it goes with data.source {', '.join(readers)})"
    more = f", nor {', '.join('data.' + n for n in ignored[1:])}" if ignored[1:] else ""
    raise ConfigError(
        f"data.{name} is {value!r}, but data.source {source} for a {kind} model "
        f"doesn't read it{more}; {fix}"
    )


def share_options(
    data: DataConfig, parts: Sequence[DataConfig], sources: Sequence[str], kind: str
) -> list[DataConfig]:
    """Return the options of a mixture's parts, each without what it doesn't read.

    Raises ConfigError for an option that none reads.
    """
    used = [used_options(part, s, kind) for part, s in zip(parts, sources, strict=True)]
    for name in _given(data, ()):
        if name in OF_FORMATS and not any(name in names for names in used):
            readers = ", ".join(
                sorted(s for s in _USED if s != "mix" and name in _USED[s])
            )
            raise ConfigError(
                f"data.{name} is {getattr(data, name)!r}, but no source of data.mix "
                f"reads it; leave it out (it goes with {readers})"
            )
    default = DataConfig()
    return [
        dataclasses.replace(
            part, **{n: getattr(default, n) for n in OF_FORMATS - names}
        )
        for part, names in zip(parts, used, strict=True)
    ]


def _given(data: DataConfig, typed: Collection[str]) -> Iterator[str]:
    default = DataConfig()
    for field in dataclasses.fields(data):
        name = field.name
        differs = getattr(data, name) != getattr(default, name)
        if name in typed or (differs and name not in OF_PRESETS):
            yield name
