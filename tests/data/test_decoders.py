"""A prompt and what follows it read as one text, whatever the tokenizer's decoder."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from uoe_jax.config import ModelConfig
from uoe_jax.data.subword import SubwordTokenizer
from uoe_jax.data.tokenize import ByteTokenizer, IdTokenizer
from uoe_jax.errors import ConfigError
from uoe_jax.generate import continuation, encode_prompt

METASPACE = (Path(__file__).parent / "files" / "metaspace_tokenizer.json").read_text()
CORPUS = ["the cat sat on the mat and the rat sat in the hat"] * 20
SPECIAL = ["[UNK]", "<|endoftext|>"]


def trained(model, trainer, cut=None, decoder=None, normalizer=None):
    backend = Tokenizer(model)
    if cut is not None:
        backend.pre_tokenizer = cut
    if decoder is not None:
        backend.decoder = decoder
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.train_from_iterator(CORPUS, trainer)
    return backend.to_str()


def bpe(**options):
    return trainers.BpeTrainer(
        vocab_size=60, special_tokens=SPECIAL, show_progress=False, **options
    )


def known(model=models.BPE):
    return model(unk_token="[UNK]")


WHITE = pre_tokenizers.Whitespace
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
SPECS = {
    "metaspace": METASPACE,
    "metaspace without decoder": trained(
        known(), bpe(), pre_tokenizers.Metaspace()
    ),
    "wordpiece": trained(
        known(models.WordPiece),
        trainers.WordPieceTrainer(vocab_size=60, special_tokens=SPECIAL,
                                  show_progress=False),
        WHITE(),
        decoders.WordPiece(),
    ),
    "wordpiece without decoder": trained(
        known(models.WordPiece),
        trainers.WordPieceTrainer(vocab_size=60, special_tokens=SPECIAL,
                                  show_progress=False),
        WHITE(),
    ),
    "continuing prefix without decoder": trained(
        known(), bpe(continuing_subword_prefix="##"), WHITE()
    ),
    "end of word": trained(
        known(), bpe(end_of_word_suffix="</w>"), WHITE(), decoders.BPEDecoder()
    ),
    "end of word without decoder": trained(
        known(), bpe(end_of_word_suffix="</w>"), WHITE()
    ),
    "uncut without decoder": trained(known(), bpe()),
    "byte level with a blank in front": trained(
        models.BPE(), bpe(initial_alphabet=ALPHABET),
        pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel(),
    ),
    "byte level without decoder": trained(
        models.BPE(), bpe(initial_alphabet=ALPHABET),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ),
    "unigram": trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL,
                                unk_token="[UNK]", show_progress=False),
        pre_tokenizers.Metaspace(), decoders.Metaspace(),
    ),
    "lowercase": trained(
        known(), bpe(), pre_tokenizers.Metaspace(), decoders.Metaspace(),
        normalizers.Lowercase(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
@given(st.integers(1, 12))
@settings(max_examples=12, deadline=None)
def test_what_follows_a_prompt_joins_it_as_in_one_text(name, words):
    tokenizer = SubwordTokenizer(SPECS[name], name)
    text = CORPUS[0]
    whole = tokenizer.encode(text)
    prompt = " ".join(text.split()[:words])
    ids = tokenizer.encode(prompt)
    rest = whole[len(ids) :]
    if list(whole[: len(ids)]) != ids.tolist():  # cut elsewhere than at words
        rest = tokenizer.encode(text[len(prompt) :])
        if name != "uncut without decoder":
            return
    assert continuation(tokenizer, prompt, ids, jnp.asarray(rest)).decode() == text


def test_the_prompt_stands_as_it_was_written():
    tokenizer = SubwordTokenizer(SPECS["metaspace"], "t")
    ids = tokenizer.encode("What is")
    following = jnp.asarray(tokenizer.encode("the that"))
    said = continuation(tokenizer, "What is", ids, following).decode()
    assert said == "What is the that"
    # Also where its tokens stand for other letters.
    lower = SubwordTokenizer(SPECS["lowercase"], "t")
    ids = lower.encode("THE cat")
    said = continuation(lower, "THE cat", ids, jnp.asarray(lower.encode("sat")))
    assert said == b"THE cat sat"


def test_characters_of_several_tokens_come_out_whole():
    tokenizer = SubwordTokenizer(SPECS["byte level without decoder"], "t")
    ids = tokenizer.encode("cat é🙂!")
    assert len(ids) > 6 and tokenizer.decode_bytes(ids) == "cat é🙂!".encode()
    prompt = tokenizer.encode("cat")
    said = continuation(tokenizer, "cat", prompt, jnp.asarray(ids[len(prompt) :]))
    assert said == "cat é🙂!".encode()
    # What isn't a character yet comes out as the bytes it is.
    assert tokenizer.decode_bytes(ids[:-2]) == "cat é🙂!".encode()[:-2]


def test_bytes_and_ids():
    said = continuation(ByteTokenizer(), "ab", ByteTokenizer().encode("ab"),
                        jnp.array([255, 0, 99]))  # fmt: skip
    assert said == b"ab\xffc"
    ids = IdTokenizer(90)
    said = continuation(ids, "3 14", ids.encode("3 14"), jnp.array([15]))
    assert said == b"3 14 15"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "is empty"), ("3 900", "token id 900"), ("-2", "token id -2")],
)
def test_prompts_that_are_no_ids_of_the_model_are_refused(prompt, message):
    with pytest.raises(ConfigError, match=message):
        encode_prompt(IdTokenizer(90), prompt, ModelConfig(vocab_size=90))


def test_decoders_that_a_tokenizer_has_are_kept():
    for name, spec in SPECS.items():
        if json.loads(spec)["decoder"] is not None:
            kept = json.loads(SubwordTokenizer(spec, name).to_json())["decoder"]
            assert kept == json.loads(spec)["decoder"]
