"""Tokenizers: bytes, byte-level BPE trained on the data, or a given tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from uoe_jax.data.files import missing_file
from uoe_jax.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
_KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")
# Longer texts are encoded in pieces, so that one long file uses every core.
_PIECE_BYTES = 1 << 16
_TRAINING_BYTES = 64 << 20  # BPE is trained on at most so much of the train split


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


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` package, whatever its algorithm."""

    def __init__(self, text: str, name: str):
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_str(text)
        except Exception as error:  # the package raises plain Exception
            raise DataError(
                f"{name} isn't a tokenizer.json ({str(error)[:100]}); save it with the "
                "tokenizers package"
            ) from None
        # The name of a special token in a text is text.
        self._backend.encode_special_tokens = True
        self._backend.no_padding()
        self._backend.no_truncation()
        self.name = name
        spec = json.loads(text)
        if spec.get("decoder") is None:
            spec["decoder"] = _set_decoder(self._backend, spec)
        vocab = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        ends = [vocab[t] for t in _KNOWN_ENDS if t in vocab]
        if not ends:
            raise DataError(
                f"{name} has no end-of-document token; add one of "
                f"{', '.join(_KNOWN_ENDS)}"
            )
        self.end_of_document: int | None = ends[0]
        self._byte_level = _is_byte_level(spec)
        self.token_bytes: Float[np.ndarray, " V"] | None = None
        if self._byte_level:
            self.token_bytes = self._count_token_bytes(vocab)

    def to_json(self) -> str:
        """Return the text of a tokenizer.json."""
        return self._backend.to_str()

    def _count_token_bytes(self, vocab: dict[str, int]) -> Float[np.ndarray, " V"]:
        """Return bytes a token; a byte-level token has one character for each byte."""
        table = np.zeros(self.vocab_size)
        for token, index in vocab.items():
            table[index] = len(token)
        for index, token in self._backend.get_added_tokens_decoder().items():
            table[index] = len(token.content.encode())
        table[self.end_of_document] = 1
        return table

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        """Return the ids of a text, no special token added."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return np.array(ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids; special and unknown ids don't show."""
        known = np.asarray(ids).ravel()
        known = known[(known >= 0) & (known < self.vocab_size)]
        return self._backend.decode(known.tolist(), skip_special_tokens=True)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Return the bytes of ids: of a byte-level tokenizer as they are."""
        if not self._byte_level:
            return self.decode(ids).encode("utf-8", "replace")
        added = self._backend.get_added_tokens_decoder()
        found = []
        for index in np.asarray(ids).ravel().tolist():
            if index in added:
                token = added[index]
                found.append(b"" if token.special else token.content.encode())
            else:
                token = self._backend.id_to_token(index) or ""
                found.append(bytes(_BYTE_OF[c] for c in token))
        return b"".join(found)

    def encode_documents(
        self, documents: Sequence[bytes | memoryview]
    ) -> list[np.ndarray]:
        """Return the ids of every document, all documents encoded in parallel."""
        pieces, owner = [], []
        for index, document in enumerate(documents):
            # Only byte-level tokenizers can be cut without a trace.
            parts = _split_pieces(document) if self._byte_level else [bytes(document)]
            for part in parts:
                pieces.append(part.decode("utf-8"))
                owner.append(index)
        encoded = self._backend.encode_batch_fast(pieces, add_special_tokens=False)
        parts_of: list[list[int]] = [[] for _ in documents]
        for index, piece in zip(owner, encoded, strict=True):
            parts_of[index].extend(piece.ids)
        return [np.array(ids, np.int32) for ids in parts_of]


def _byte_characters() -> dict[str, int]:
    """Return the byte that each character of a byte-level token stands for.

    GPT-2's table: bytes that print are themselves, the others follow from U+0100.
    """
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    table = {chr(byte): byte for byte in printed}
    return table | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_characters()


def _set_decoder(backend: Any, spec: dict[str, Any]) -> dict[str, Any] | None:
    """Give a tokenizer without a decoder the one that undoes how it cuts words.

    Without any, the package joins tokens with blanks. Returns the decoder as JSON.
    """
    from tokenizers import decoders

    model, cuts = spec["model"], spec.get("pre_tokenizer") or {}
    kinds = {c.get("type"): c for c in cuts.get("pretokenizers", [cuts])}
    if "ByteLevel" in kinds:
        chosen: Any = decoders.ByteLevel()
    elif "Metaspace" in kinds:
        chosen = decoders.Metaspace(
            replacement=kinds["Metaspace"].get("replacement", "\u2581"),
            prepend_scheme=kinds["Metaspace"].get("prepend_scheme", "always"),
        )
    elif model.get("end_of_word_suffix"):
        chosen = decoders.BPEDecoder(suffix=model["end_of_word_suffix"])
    elif prefix := model.get("continuing_subword_prefix"):
        chosen = decoders.WordPiece(prefix=prefix, cleanup=False)
    elif model.get("type") in ("BPE", "Unigram") and not kinds.keys() - {None}:
        chosen = decoders.Fuse()  # words aren't cut, so tokens touch
    else:
        return None
    backend.decoder = chosen
    return json.loads(backend.to_str())["decoder"]


def _is_byte_level(spec: dict[str, Any]) -> bool:
    """Return whether ids decode to bytes one by one, with nothing normalised away."""
    decoder = spec.get("decoder") or {}
    kinds = [d.get("type") for d in decoder.get("decoders", [decoder])]
    return kinds == ["ByteLevel"] and spec.get("normalizer") is None


def _split_pieces(document: bytes | memoryview) -> Iterator[bytes]:
    """Cut a long text into pieces that end with a line."""
    data = bytes(document)
    start = 0
    while len(data) - start > _PIECE_BYTES:
        newline = data.find(b"\n", start + _PIECE_BYTES)
        if newline < 0:
            break
        yield data[start : newline + 1]
        start = newline + 1
    yield data[start:]


def train_bpe(documents: Iterable[bytes | memoryview], vocab_size: int) -> str:
    """Return the tokenizer.json of a byte-level BPE trained on the first documents.

    Sennrich, Haddow and Birch 2016, over bytes as in GPT-2: any UTF-8 text survives
    encode and decode. Token 0 ends a document.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_first_texts(documents), trainer)
    return backend.to_str()


def _first_texts(documents: Iterable[bytes | memoryview]) -> Iterator[str]:
    left = _TRAINING_BYTES
    for document in documents:
        for piece in _split_pieces(document):
            yield piece.decode("utf-8")
            left -= len(piece)
            if left <= 0:
                return


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
    """Whether a `data.tokenizer` is the path of a tokenizer.json or of its folder."""
    return name not in ("byte", "bpe")


def tokenizer_file(path: str) -> Path:
    """Return the tokenizer.json at a path, which may be the folder that holds one."""
    file = Path(path).expanduser()
    return file / "tokenizer.json" if file.is_dir() else file


def load_tokenizer(path: str) -> SubwordTokenizer:
    """Return the tokenizer of a tokenizer.json; raise DataError if it isn't one."""
    file = tokenizer_file(path)
    if not file.is_file():
        raise DataError(missing_file(file, "data.tokenizer (byte, bpe or a file)"))
    try:
        return SubwordTokenizer(file.read_text("utf-8"), file.name)
    except UnicodeDecodeError:
        raise DataError(f"{path} isn't a tokenizer.json: it isn't UTF-8") from None
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror})") from None
