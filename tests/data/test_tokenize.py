"""Text survives encode and decode; BPE is deterministic; tokens know their bytes."""

from __future__ import annotations

import json
import logging
import sys
import types

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.data import make_dataset
from uoe_jax.data.prepare import absolute_paths
from uoe_jax.data.tokenize import (
    END_OF_DOCUMENT,
    ByteTokenizer,
    IdTokenizer,
    SubwordTokenizer,
    load_tokenizer,
    train_bpe,
)
from uoe_jax.errors import DataError

CORPUS = [f"the tale {i} of thé {i * i} 漢字 hats\n".encode() for i in range(60)]
BPE = SubwordTokenizer(train_bpe(CORPUS, 400), "bpe")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@given(text=TEXT)
@settings(max_examples=200, deadline=None)
def test_bpe_round_trip(text):
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert BPE.token_bytes[ids].sum() == len(text.encode())


@given(text=TEXT)
@settings(max_examples=200, deadline=None)
def test_byte_round_trip(text):
    # Byte 0 is the end of a document and doesn't show.
    ids = ByteTokenizer().encode(text)
    assert ByteTokenizer().decode(ids) == text.replace("\0", "")
    assert len(ids) == len(text.encode())


@given(texts=st.lists(TEXT, max_size=5))
@settings(max_examples=50, deadline=None)
def test_documents_encode_like_texts(texts):
    data = [t.encode() for t in texts]
    for tokenizer in (BPE, ByteTokenizer()):
        together = tokenizer.encode_documents(data)
        assert [ids.tolist() for ids in together] == [
            tokenizer.encode(t).tolist() for t in texts
        ]


def test_long_documents_are_cut_without_a_trace():
    text = "".join(f"a line {i} of hats  \n\n" for i in range(9000))
    assert len(text) > 3 << 16
    (ids,) = BPE.encode_documents([text.encode()])
    assert BPE.decode(ids) == text
    assert BPE.token_bytes[ids].sum() == len(text)


def test_training_is_deterministic():
    assert train_bpe(CORPUS, 400) == train_bpe(CORPUS, 400)


def test_trained_tokenizer_compresses_and_keeps_its_size():
    text = b"".join(CORPUS).decode()
    assert len(BPE.encode(text)) < 0.5 * len(text)
    assert BPE.vocab_size == 400 and BPE.end_of_document == 0


def test_the_name_of_the_end_of_document_is_text():
    ids = BPE.encode(f"a{END_OF_DOCUMENT}b")
    assert BPE.end_of_document not in ids
    assert BPE.decode(ids) == f"a{END_OF_DOCUMENT}b"
    assert BPE.decode([BPE.end_of_document]) == ""


@pytest.mark.parametrize("tokenizer", [BPE, ByteTokenizer()])
def test_ids_out_of_range_are_passed_over(tokenizer):
    ids = tokenizer.encode("hats").tolist()
    assert tokenizer.decode([*ids, 100_000]) == "hats"


def test_a_saved_tokenizer_gives_the_same_ids(tmp_path, make_config, text_file):
    (tmp_path / "tokenizer.json").write_text(BPE.to_json())
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert loaded.encode("the hats").tolist() == BPE.encode("the hats").tolist()
    config = make_config(
        text_file, tokenizer=str(tmp_path / "tokenizer.json"), vocab_size=400
    )
    dataset = make_dataset(config, "train")
    # The prepared data keeps its own copy.
    (tmp_path / "tokenizer.json").write_text(BPE.to_json())
    assert dataset.decode(dataset.encode("line 3")) == "line 3"
    assert dataset.info["tokenizer"]["name"] == "tokenizer.json"


def test_a_tokenizer_that_rewrites_text_counts_average_bytes(
    tmp_path, make_config, text_file
):
    spec = json.loads(BPE.to_json())
    spec["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    config = make_config(
        text_file, tokenizer=str(tmp_path / "tokenizer.json"), vocab_size=400
    )
    dataset = make_dataset(config, "valid")
    counts = dataset.info["splits"]["valid"]
    assert not counts["exact_bytes"]
    assert np.all(dataset.token_bytes == counts["bytes"] / counts["tokens"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "tokenizer.json isn't a tokenizer.json ("),
        (
            BPE.to_json().replace(END_OF_DOCUMENT, "<|stop|>"),
            "tokenizer.json has no end-of-document token; add one of <|endoftext|>",
        ),
    ],
)
def test_unusable_tokenizers_are_refused(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError) as caught:
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_tokenizer_names_the_nearest_file(tmp_path):
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(DataError, match=r"did you mean tokenizer\.json"):
        load_tokenizer(str(tmp_path / "tokeniser.json"))


def test_ids_are_written_as_numbers():
    tokenizer = IdTokenizer(100)
    assert tokenizer.decode(tokenizer.encode("3 14 15")) == "3 14 15"
    with pytest.raises(DataError, match="isn't token ids"):
        tokenizer.encode("three")


class Hub:
    """The hub's side of `tokenizers`: one model, and a count of calls."""

    def __init__(self, error=None):
        self.asked, self.error = [], error

    def __call__(self, name):
        self.asked.append(name)
        logging.getLogger("huggingface_hub.utils._http").warning("try 1 of 5")
        if self.error:
            raise self.error
        return tokenizers.Tokenizer.from_str(BPE.to_json())


def test_a_tokenizer_of_the_hub_is_fetched_once(
    tmp_path, make_config, text_file, monkeypatch
):
    hub = Hub()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tokenizers.Tokenizer, "from_pretrained", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.ModuleType("hub"))
    config = make_config(text_file, tokenizer="hf:org/small", vocab_size=400)
    dataset = make_dataset(config, "train")
    assert dataset.info["tokenizer"]["vocab_size"] == BPE.vocab_size
    again = load_tokenizer("hf:org/small")
    assert again.encode("hats").tolist() == BPE.encode("hats").tolist()
    assert hub.asked == ["org/small"]
    assert absolute_paths(config.data).tokenizer == "hf:org/small"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hf:org/small", r"hf:org/small can't be fetched \(no route to host\); check"),
        ("hf:../../etc", "write hf:NAME or hf:ORG/NAME"),
        ("gpt2", "use byte, bpe, a tokenizer.json, or hf:NAME of the hub, as hf:gpt2"),
        ("no/such.json", "data.tokenizer no/such.json doesn't exist, nor does its fol"),
    ],
)
def test_a_tokenizer_that_the_hub_cant_give_is_one_line(
    name, says, tmp_path, monkeypatch, caplog
):
    error = Exception("no route to host\nand more lines")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tokenizers.Tokenizer, "from_pretrained", Hub(error))
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.ModuleType("hub"))
    with pytest.raises(DataError, match=says) as told:
        load_tokenizer(name)
    assert "\n" not in str(told.value)
    assert not list(tmp_path.rglob("*.json"))
    assert not caplog.records  # its own tries aren't told of
