"""Subword tokenizers: a given tokenizer.json, whatever its algorithm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from uoe_jax.data.bpe import END_OF_DOCUMENT, split_pieces
from uoe_jax.errors import DataError, extra_packages
from uoe_jax.files import parse_json

_KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")
_MOST_IDS = 1 << 24  # a table of more, one number an id, would take the memory
_AT_ONCE = 64  # pieces encoded in one call, which hears no Ctrl-C


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` package, whatever its algorithm."""

    def __init__(self, text: str, name: str):
        with extra_packages():
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
        spec = parse_json(text, name)
        if spec.get("decoder") is None:
            spec["decoder"] = _set_decoder(self._backend, spec)
        vocab = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        if not 0 < self.vocab_size <= _MOST_IDS:
            raise DataError(
                f"{name} has ids up to {self.vocab_size - 1}; give a tokenizer with 1 "
                f"to {_MOST_IDS:,} of them"
            )
        ends = [vocab[t] for t in _KNOWN_ENDS if t in vocab]
        if not ends:
            raise DataError(
                f"{name} has no end-of-document token; add one of "
                f"{', '.join(_KNOWN_ENDS)}"
            )
        self.end_of_document: int | None = ends[0]
        self._byte_level = _is_byte_level(spec)
        self.unknown: int | None = _find_unknown(spec, vocab)
        # BPE without an unknown token drops the characters that aren't here.
        self._known = set[str]()
        if self.unknown is None and not spec["model"].get("byte_fallback"):
            self._known = _single_characters(spec["model"], vocab)
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
        found = self._encode(
            lambda: self._backend.encode(text, add_special_tokens=False)
        )
        return np.array(found.ids, np.int32)

    def encode_prompt(self, text: str) -> Int[np.ndarray, " T"]:
        """Return the ids of a text with what its post-processor puts around it.

        Tokenizers of Llama's kind begin a text with a token of its own.
        """
        found = self._encode(lambda: self._backend.encode(text))
        return np.array(found.ids, np.int32)

    def special_tokens(self) -> dict[str, int]:
        """Return the ids of tokens that stand for no text, by their names."""
        added = self._backend.get_added_tokens_decoder()
        return {t.content: index for index, t in added.items() if t.special}

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

    def count_lost(self, document: bytes | memoryview) -> int:
        """Return the bytes of a text that no token stands for but the unknown one.

        White space doesn't count: decoders put back what is dropped between words.
        """
        if self.token_bytes is not None:
            (ids,) = self.encode_documents([document])
            return max(len(document) - int(self.token_bytes[ids].sum()), 0)
        text = str(document, "utf-8")
        if self._known:
            if self._backend.normalizer is not None:
                text = self._backend.normalizer.normalize_str(text)
            return sum(
                len(c.encode())
                for c in text
                if c not in self._known and not c.isspace()
            )
        found = self._encode(
            lambda: self._backend.encode(text, add_special_tokens=False)
        )
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        sizes = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
        spans = np.array(found.offsets, np.int64).reshape(-1, 2)
        spans = spans[np.array(found.ids, np.int64) != self.unknown]
        depth = np.zeros(len(codes) + 1, np.int64)
        np.add.at(depth, spans[:, 0], 1)
        np.add.at(depth, spans[:, 1], -1)
        blank = np.isin(codes, _BLANKS)
        return int(sizes[(np.cumsum(depth)[:-1] <= 0) & ~blank].sum())

    def _encode[T](self, encode: Callable[[], T]) -> T:
        """Encode; raise DataError where the package refuses a text."""
        try:
            return encode()
        except Exception as error:  # the package raises plain Exception
            raise DataError(
                f"tokenizer {self.name} can't encode the text "
                f"({' '.join(str(error).split())[:100]}); give it an unknown token"
            ) from None

    def encode_documents(
        self, documents: Sequence[bytes | memoryview]
    ) -> list[np.ndarray]:
        """Return the ids of every document, all documents encoded in parallel."""
        pieces, owner = [], []
        for index, document in enumerate(documents):
            # Only byte-level tokenizers can be cut without a trace.
            parts = split_pieces(document) if self._byte_level else [bytes(document)]
            for part in parts:
                pieces.append(part.decode("utf-8"))
                owner.append(index)
        parts_of: list[list[int]] = [[] for _ in documents]
        for start in range(0, len(pieces), _AT_ONCE):
            some = pieces[start : start + _AT_ONCE]
            encoded = self._encode(
                lambda some=some: self._backend.encode_batch_fast(
                    some, add_special_tokens=False
                )
            )
            for index, piece in zip(owner[start:], encoded, strict=False):
                parts_of[index].extend(piece.ids)
        return [np.array(ids, np.int32) for ids in parts_of]


def _find_unknown(spec: dict[str, Any], vocab: dict[str, int]) -> int | None:
    """Return the id that stands for what the vocabulary lacks, if there is one."""
    model = spec["model"]
    return vocab.get(model.get("unk_token") or "", model.get("unk_id"))


def _single_characters(model: dict[str, Any], vocab: dict[str, int]) -> set[str]:
    """Return the characters that BPE starts from, as parts or ends of words."""
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    bare = (token.removeprefix(prefix).removesuffix(suffix) for token in vocab)
    return {token for token in bare if len(token) == 1}


def _byte_characters() -> dict[str, int]:
    """Return the byte that each character of a byte-level token stands for.

    GPT-2's table: bytes that print are themselves, the others follow from U+0100.
    """
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    table = {chr(byte): byte for byte in printed}
    return table | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_characters()
_BLANKS = np.array([ord(c) for c in map(chr, range(0x3001)) if c.isspace()], np.uint32)


def _set_decoder(backend: Any, spec: dict[str, Any]) -> dict[str, Any] | None:
    """Give a tokenizer without a decoder the one that undoes how it cuts words.

    Without any, the package joins tokens with blanks. Returns the decoder as JSON.
    """
    with extra_packages():
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
    return parse_json(backend.to_str(), "the tokenizer")["decoder"]


def _is_byte_level(spec: dict[str, Any]) -> bool:
    """Return whether ids decode to bytes one by one, with nothing normalised away."""
    decoder = spec.get("decoder") or {}
    kinds = [d.get("type") for d in decoder.get("decoders", [decoder])]
    return kinds == ["ByteLevel"] and spec.get("normalizer") is None
