"""A folder or file of another library, looked at: its config, family and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from uoe_jax.config import DType, ModelConfig
from uoe_jax.errors import ConfigError, DataError, shown
from uoe_jax.files import read_json
from uoe_jax.interop.families import find_family
from uoe_jax.interop.match import Match, find_dtype, match_tensors
from uoe_jax.interop.names import Family, Source, find_sources
from uoe_jax.interop.safetensors import open_folder, refuse_pickle
from uoe_jax.validation import validate_model

CONFIG, GENERATION = "config.json", "generation_config.json"
# What is kept beside the run, and given back when it is exported.
KEPT = (
    CONFIG,
    GENERATION,
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_KEPT_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A model of another library, whose weights aren't read yet."""

    source: str
    raw: Mapping[str, Any]  # its config.json
    family: Family
    model: ModelConfig
    files: Any  # `TensorFiles`, or what reads as it does
    sources: list[Source]
    match: Match
    tokenizer: str | None  # the text of a tokenizer.json
    kept: Mapping[str, str]  # small files by name


def open_foreign(path: Path, dtype: DType | None = None) -> Foreign:
    """Return the model of a folder of safetensors, or of a GGUF file.

    `dtype` None keeps the file's. Raises DataError for what is missing, isn't
    supported or doesn't fit together, before any weight is read.
    """
    if path.suffix == ".gguf" and path.is_file():
        from uoe_jax.interop.gguf import open_gguf

        return _settle(*open_gguf(path), dtype=dtype)
    if path.is_file():
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
            refuse_pickle(path)
        raise DataError(f"{path} is no folder and no .gguf file; give one of these")
    if not path.is_dir():
        raise DataError(
            f"{path} doesn't exist; give a folder, a .gguf file or hf:ORG/NAME"
        )
    raw = read_object(path / CONFIG)
    family = find_family(raw, str(path / CONFIG))
    files = open_folder(path)
    kept = {name: text for name in KEPT if (text := _small(path / name)) is not None}
    from uoe_jax.interop.tokenizer import find_tokenizer

    return _settle(
        str(path), raw, family, files, find_tokenizer(path), kept, dtype=dtype
    )


def _settle(
    source: str,
    raw: Mapping[str, Any],
    family: Family,
    files: Any,
    tokenizer: str | None,
    kept: Mapping[str, str],
    *,
    dtype: DType | None,
) -> Foreign:
    """Return the model with its tensors found and its config checked."""
    try:
        model = family.read(raw, files.names())
        validate_model(model)
        sources = find_sources(model, family)
    except (ConfigError, DataError) as error:
        raise DataError(f"{source}: {error}") from None
    match = match_tensors(files, sources, family, source)
    held = dtype or find_dtype(files, match, source)
    model = replace(model, param_dtype=held, compute_dtype=held)
    return Foreign(
        source=source,
        raw=raw,
        family=family,
        model=model,
        files=files,
        sources=sources,
        match=match,
        tokenizer=tokenizer,
        kept=kept,
    )


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON file's object; DataError if it is absent or holds another thing."""
    if not path.is_file():
        raise DataError(f"{path} doesn't exist; give a folder that has one")
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise DataError(f"{path} is {shown(raw)}; expected an object")
    return raw


def _small(path: Path) -> str | None:
    """Return the text of a small file beside the weights; None where there is none."""
    if not path.is_file() or path.stat().st_size > _KEPT_BYTES:
        return None
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path} isn't UTF-8; restore it") from None
