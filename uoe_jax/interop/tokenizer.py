"""Tokenizers of other libraries as the text of a tokenizer.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from uoe_jax.data.subword import SubwordTokenizer
from uoe_jax.errors import DataError, extra_packages
from uoe_jax.files import read_json

TOKENIZER = "tokenizer.json"
# Protobuf files of SentencePiece, as older models have them.
_SENTENCE_PIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def find_tokenizer(folder: Path) -> str | None:
    """Return the tokenizer of a folder; None where there is none.

    A tokenizer.json, or the one other .json whose name says tokenizer, or the older
    pairs that GPT-2 (vocab.json, merges.txt) and BERT (vocab.txt) have. Raises
    DataError for one that can't be read, such as SentencePiece's own file.
    """
    file = folder / TOKENIZER
    others = [
        path
        for path in sorted(folder.glob("*tokenizer*.json"))
        if path.name not in (TOKENIZER, "tokenizer_config.json")
    ]
    if not file.is_file() and len(others) == 1:
        file = others[0]
    try:
        if file.is_file():
            return _read_json(file)
        if (folder / "merges.txt").is_file() and (folder / "vocab.json").is_file():
            merges = (folder / "merges.txt").read_text("utf-8").splitlines()
            pairs = [m for m in merges if m and not m.startswith("#version")]
            return byte_level(read_json(folder / "vocab.json"), pairs)
        if (folder / "vocab.txt").is_file():
            return word_piece((folder / "vocab.txt").read_text("utf-8").split("\n"))
    except UnicodeDecodeError as error:
        raise DataError(f"the tokenizer of {folder} isn't UTF-8 ({error})") from None
    for name in _SENTENCE_PIECE:
        if (folder / name).is_file():
            raise DataError(
                f"{folder} has its tokenizer as {name} alone, which isn't read; write "
                "a tokenizer.json beside it: transformers.AutoTokenizer"
                f".from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
            )
    return None


def _read_json(file: Path) -> str:
    """Return a tokenizer.json; llama2.c's list of pieces is turned into one."""
    spec = read_json(file)
    if isinstance(spec, dict) and {"pieces", "scores"} <= spec.keys():
        return sentence_piece(spec["pieces"], spec["scores"])
    return file.read_text("utf-8")


def usable(text: str, name: str, vocab_size: int) -> str | None:
    """Return why a tokenizer can't serve a model, or None where it can."""
    try:
        found = SubwordTokenizer(text, name)
    except DataError as error:
        return str(error)
    if found.vocab_size > vocab_size:
        return f"{name} has {found.vocab_size} entries, the model {vocab_size}"
    return None


def byte_level(
    vocab: dict[str, int],
    merges: list[str],
    digits: bool = False,
    special: list[str] | None = None,
) -> str:
    """Return a byte-level BPE (Radford et al. 2019, GPT-2); merges are pairs "a b".

    With `digits` every digit is a word of its own.
    """
    with extra_packages():
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pairs = [tuple(merge.split(" ")) for merge in merges]
    if not all(len(pair) == 2 for pair in pairs):
        raise DataError("a merge of the tokenizer isn't a pair; restore its file")
    cut: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if digits:
        cut = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), cut])
    try:
        backend = Tokenizer(models.BPE(vocab, pairs))  # pyrefly: ignore
    except Exception as error:  # the package raises plain Exception
        raise DataError(f"the tokenizer's merges don't fit ({error})") from None
    backend.pre_tokenizer = cut
    backend.decoder = decoders.ByteLevel()
    named = special or [t for t in ("<|endoftext|>",) if t in vocab]
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in named]
    )
    return backend.to_str()


def sentence_piece(pieces: list[str], scores: list[float]) -> str:
    """Return the BPE of SentencePiece (Kudo and Richardson 2018) with byte fallback.

    Its pieces are merged by highest score: a merge's rank is that of what it makes. A
    prompt begins with `<s>`.
    """
    with extra_packages():
        from tokenizers import Tokenizer, decoders, models, normalizers, processors

    blank = "\u2581"
    words = [piece.strip("\n") or piece for piece in pieces]
    words = [word.replace(" ", blank) for word in words]
    vocab = {word: number for number, word in enumerate(words)}
    order = sorted(range(len(words)), key=lambda n: -scores[n])
    merges = [
        (word[:cut], word[cut:])
        for word in (words[n] for n in order)
        for cut in range(1, len(word))
        if word[:cut] in vocab and word[cut:] in vocab
    ]
    marks = [mark for mark in ("<unk>", "<s>", "</s>") if mark in vocab]
    model = models.BPE(
        vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )  # pyrefly: ignore
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(blank), normalizers.Replace(" ", blank)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(blank, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(marks)
    if "<s>" in vocab:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
        )
    return backend.to_str()


def word_piece(words: list[str]) -> str:
    """Return BERT's uncased WordPiece with a vocabulary, one word a line."""
    with extra_packages():
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = {word: number for number, word in enumerate(words) if word}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))  # pyrefly: ignore
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    marks = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    backend.add_special_tokens([mark for mark in marks if mark in vocab])
    return backend.to_str()
