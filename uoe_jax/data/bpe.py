"""Byte-level BPE trained on the data."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from uoe_jax.data.progress import note
from uoe_jax.data.split import end_of_character
from uoe_jax.errors import extra_packages

END_OF_DOCUMENT = "<|endoftext|>"
# Longer texts are encoded in pieces, so that one long file uses every core; a line
# that is longer still is cut within.
_PIECE_BYTES = 1 << 16
_LINE_BYTES = 1 << 20
_TRAINING_BYTES = 64 << 20  # BPE is trained on at most so much of the train split
# Longer words are counted in parts of so many bytes: the time of a merge grows with the
# square of a word, and no token gets so long. A line without blanks is one word.
_WORD_BYTES = 256
_NOTE_EVERY = 10.0  # seconds between signs of life


def train_bpe(documents: Iterable[bytes | memoryview], vocab_size: int) -> str:
    """Return the tokenizer.json of a byte-level BPE trained on the first documents.

    Sennrich, Haddow and Birch 2016, over bytes as in GPT-2: any UTF-8 text survives
    encode and decode. Token 0 ends a document. Ctrl-C stops it at once.
    """
    with extra_packages():
        from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # After ByteLevel a character is a byte.
    parts = pre_tokenizers.Split(Regex(f".{{1,{_WORD_BYTES}}}"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, parts])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = _first_texts(documents)
    _in_background(lambda: backend.train_from_iterator(texts, trainer), vocab_size)
    backend.pre_tokenizer = words
    return backend.to_str()


def _in_background(work: Callable[[], Any], vocab_size: int) -> None:
    """Do work in a thread, so that this one hears Ctrl-C, and say that it goes on."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # raised below, in the caller's thread
            failure.append(error)

    thread = threading.Thread(target=run, name="train-bpe", daemon=True)
    begun = said = time.monotonic()
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
        now = time.monotonic()
        if now - said > _NOTE_EVERY:
            said = now
            note(f"training BPE of {vocab_size:,} tokens: {now - begun:.0f} s so far")
    if failure:
        raise failure[0]


def _first_texts(documents: Iterable[bytes | memoryview]) -> Iterator[str]:
    left = _TRAINING_BYTES
    for document in documents:
        for piece in split_pieces(document):
            yield piece.decode("utf-8")
            left -= len(piece)
            if left <= 0:
                return


def split_pieces(document: bytes | memoryview) -> Iterator[bytes]:
    """Cut a long text into pieces that end with a line, or at least a character."""
    data = bytes(document)
    start = 0
    while len(data) - start > _PIECE_BYTES:
        newline = data.find(b"\n", start + _PIECE_BYTES, start + _LINE_BYTES)
        if newline < 0 and len(data) - start <= _LINE_BYTES:
            break
        end = newline + 1
        if newline < 0:
            end = end_of_character(data, start + _LINE_BYTES)
        yield data[start:end]
        start = end
    yield data[start:]
