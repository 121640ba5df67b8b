"""Tokenizers: bytes, ids, and those of a tokenizer.json by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from uoe_jax.data.bpe import END_OF_DOCUMENT, train_bpe
from uoe_jax.data.files import missing_file
from uoe_jax.data.progress import note, unlogged
from uoe_jax.data.subword import SubwordTokenizer
from uoe_jax.errors import DataError, extra_packages, first_line
from uoe_jax.files import user_cache, write_atomically

__all__ = [
    "END_OF_DOCUMENT",
    "ByteTokenizer",
    "IdTokenizer",
    "SubwordTokenizer",
    "Tokenizer",
    "hub_name",
    "is_file_tokenizer",
    "load_tokenizer",
    "make_tokenizer",
    "tokenizer_file",
    "train_bpe",
]

HUB = "hf:"  # before the name of a model of the Hugging Face hub


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back."""

    name: str
    vocab_size: int
    end_of_document: int | None
    # Bytes that each token stands for, if that is a property of the token alone; an
    # end of document counts as one, whatever the tokenizer, so that bits per byte of
    # different tokenizers compare.
    token_bytes: Float[np.ndarray, " V"] | None

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        """Return the ids of a text."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids, without end-of-document tokens."""
        ...

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Return the bytes of ids, which need not be UTF-8."""
        ...

    def encode_documents(
        self, documents: Sequence[bytes | memoryview]
    ) -> list[np.ndarray]:
        """Return the ids of every document, none added."""
        ...


class ByteTokenizer:
    """A token is a byte; byte 0, which text doesn't use, ends a document.

    A zero byte in the data therefore reads as the end of a document.
    """

    def __init__(self) -> None:
        self.name = "byte"
        self.vocab_size = 256
        self.end_of_document: int | None = 0
        self.token_bytes: Float[np.ndarray, " V"] | None = np.ones(256)

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        """Return the UTF-8 bytes of a text."""
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of bytes; broken UTF-8 shows as U+FFFD, ends don't show."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Return the bytes of ids, without ends of document."""
        return bytes(i for i in np.asarray(ids).ravel().tolist() if 0 < i < 256)

    def encode_documents(
        self, documents: Sequence[bytes | memoryview]
    ) -> list[np.ndarray]:
        """Return the bytes of every document."""
        return [np.frombuffer(d, np.uint8) for d in documents]


class IdTokenizer:
    """Data that came as token ids: text is their numbers, separated by blanks."""

    def __init__(self, vocab_size: int):
        self.name = "ids"
        self.vocab_size = vocab_size
        self.end_of_document: int | None = None
        self.token_bytes: Float[np.ndarray, " V"] | None = None

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        """Return the ids written in a text; raise DataError if it isn't numbers."""
        try:
            return np.array([int(word) for word in text.split()], np.int32)
        except ValueError:
            raise DataError(
                f"text {text[:40]!r} isn't token ids; the data has no tokenizer, so "
                "write numbers separated by blanks"
            ) from None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return ids as numbers separated by blanks."""
        return " ".join(map(str, np.asarray(ids).ravel().tolist()))

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Return the text of ids as ASCII."""
        return self.decode(ids).encode()

    def encode_documents(
        self, documents: Sequence[bytes | memoryview]
    ) -> list[np.ndarray]:
        """Return the ids written in every document."""
        return [self.encode(str(d, "utf-8")) for d in documents]


def make_tokenizer(entry: dict[str, Any], text: str | None) -> Tokenizer:
    """Return the tokenizer that a manifest's entry and a tokenizer.json describe."""
    if entry["name"] == "byte":
        return ByteTokenizer()
    if entry["name"] == "ids":
        return IdTokenizer(entry["vocab_size"])
    if text is None:
        raise DataError(f"tokenizer {entry['name']} has no tokenizer.json; restore it")
    return SubwordTokenizer(text, entry["name"])


def is_file_tokenizer(name: str) -> bool:
    """Whether a `data.tokenizer` is a tokenizer.json: of a path, or of hf:NAME."""
    return name not in ("byte", "bpe")


def hub_name(name: str) -> str | None:
    """Return ORG/NAME of a `data.tokenizer` of the Hugging Face hub, hf:ORG/NAME."""
    return name.removeprefix(HUB) if name.startswith(HUB) else None


def _from_hub(name: str) -> Path:
    """Return the tokenizer.json of a model of the hub, fetched once and then kept.

    Raises DataError, in one line, where the hub can't be reached or hasn't got it.
    """
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise DataError(
            f"data.tokenizer is {HUB + name!r}; write hf:NAME or hf:ORG/NAME, as the "
            "hub has it"
        )
    file = user_cache() / "tokenizers" / f"{name.replace('/', '--')}.json"
    if file.is_file():
        return file
    note(f"fetching the tokenizer of {HUB}{name} ...")
    with extra_packages():
        import huggingface_hub  # noqa: F401  (`tokenizers` fetches with it)
        from tokenizers import Tokenizer as Backend
    try:
        with unlogged():
            text = Backend.from_pretrained(name).to_str()
    except Exception as error:  # of the network, of the hub: plain Exception too
        raise DataError(
            f"data.tokenizer {HUB}{name} can't be fetched ({first_line(error)}); check "
            "the name and the network, or give a tokenizer.json"
        ) from None
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text)
    return file


def tokenizer_file(path: str) -> Path:
    """Return the tokenizer.json at a path, in its folder, or of the hub's hf:NAME."""
    if name := hub_name(path):
        return _from_hub(name)
    file = Path(path).expanduser()
    return file / "tokenizer.json" if file.is_dir() else file


def check_tokenizer(name: str) -> None:
    """Raise DataError for a `data.tokenizer` that names no file that is there.

    Nothing is read or fetched: this is for before jax is loaded.
    """
    if not is_file_tokenizer(name) or hub_name(name):
        return
    file = tokenizer_file(name)
    if file.is_file():
        return
    if file.name == "tokenizer.json" and (file.parent / "checkpoints").is_dir():
        raise DataError(no_tokenizer_in(file.parent))  # a run, of an import
    if "/" in name or file.suffix == ".json":
        raise DataError(missing_file(file, "data.tokenizer"))
    raise DataError(
        f"data.tokenizer is {name!r}; use byte, bpe, a tokenizer.json, or {HUB}NAME of "
        f"the hub, as {HUB}{name}"
    )


def no_tokenizer_in(run: Path | str) -> str:
    """Return the message for a run whose model was imported without a tokenizer."""
    return (
        f"{run} has no tokenizer: none came with its model; put the model's "
        f"tokenizer.json into {run}"
    )


def load_tokenizer(path: str) -> SubwordTokenizer:
    """Return the tokenizer of a tokenizer.json; raise DataError if it isn't one."""
    check_tokenizer(path)
    file = tokenizer_file(path)
    try:
        return SubwordTokenizer(file.read_text("utf-8"), file.name)
    except UnicodeDecodeError:
        raise DataError(f"{path} isn't a tokenizer.json: it isn't UTF-8") from None
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror})") from None
