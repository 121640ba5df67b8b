"""Every kind of text source gives its bytes, whole, in order, in disjoint splits."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.config import DataConfig
from uoe_jax.data import make_dataset, prepare
from uoe_jax.data.files import SourceFile
from uoe_jax.data.source import make_source
from uoe_jax.data.text import FileSource, RangeSource
from uoe_jax.errors import DataError


def stream(config, split):
    return bytes(np.array(prepare(config).array(split, "tokens")))


def streams(config):
    return [stream(config, split) for split in ("train", "valid", "test")]


def refused(config, split="train"):
    with pytest.raises(DataError) as caught:
        make_dataset(config, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_stdlib_is_this_pythons_source_and_splits_are_whole_files(make_config):
    source = make_source(DataConfig(), "decoder")
    names = {f.name for f in source.files}
    assert "json/decoder.py" in names and len(names) > 300
    assert not [n for n in names if n.startswith(("test/", "site-packages/"))]
    config = make_config(max_bytes=300_000)
    parts = [set(s.split(b"\0")) - {b""} for s in streams(config)]
    assert all(parts)
    assert not parts[0] & parts[1] and not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    contents = {f.path.read_bytes() for f in source.files}
    whole = [p in contents for part in parts for p in part]
    assert whole.count(False) <= 1  # the file that max_bytes cut short


def test_one_file_is_cut_into_three_ranges(make_config, text_file):
    train, valid, test = streams(make_config(text_file))
    assert train + valid + test == text_file.read_bytes() + b"\0"
    assert 0.03 < len(valid) / len(train) < 0.08
    # The cuts fall on the article ends of the text.
    assert train.endswith(b"\n\n") and valid.endswith(b"\n\n")


@pytest.mark.parametrize(
    ("suffix", "opener"), [(".gz", gzip), (".xz", lzma), (".bz2", bz2)]
)
def test_packed_files_read_like_plain_ones(
    make_config, text_file, tmp_path, suffix, opener
):
    packed = tmp_path / f"tale.txt{suffix}"
    packed.write_bytes(opener.compress(text_file.read_bytes()))
    assert streams(make_config(packed)) == streams(make_config(text_file))


def test_folder_of_many_files_is_split_by_file(make_config, tmp_path):
    for i in range(60):
        (tmp_path / "texts" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / str(i % 3) / f"{i}.txt").write_text(f"text {i // 2}\n")
    parts = [
        set(s.split(b"\0")) - {b""} for s in streams(make_config(tmp_path / "texts"))
    ]
    assert all(parts) and len(set.union(*parts)) == 30
    # Twins of one content are in one split.
    assert sum(map(len, parts)) == 30
    glob = make_config(tmp_path / "texts" / "*" / "1*.txt", valid_fraction=0.3)
    assert b"text 5\n" in b"".join(streams(glob))
    assert b"text 15\n" not in b"".join(streams(glob))


def test_files_named_by_split_are_used_so(make_config, tmp_path):
    for split, word in (("train", "a"), ("valid", "b"), ("test", "c")):
        (tmp_path / "t").mkdir(exist_ok=True)
        (tmp_path / "t" / f"wiki.{split}.tokens").write_text(f"{word} \n" * 99)
    texts = streams(make_config(tmp_path / "t"))
    assert [set(t) - set(b" \n\0") for t in texts] == [{97}, {98}, {99}]


@given(cut=st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_max_bytes_breaks_no_character(cut, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    (folder / "a.txt").write_text("aé漢🙂" * 6)
    whole = (folder / "a.txt").read_bytes()
    files = (SourceFile("a.txt", folder / "a.txt"),)
    config = DataConfig(max_bytes=cut, valid_fraction=0.0, test_fraction=0.0)
    for cls in (FileSource, RangeSource):
        data = b"".join(bytes(d.data) for d in cls("a", files, config).documents())
        data.decode()
        assert whole.startswith(data) and cut - 4 < len(data) <= cut


def test_jsonl_repeats_stay_in_one_split(make_config, tmp_path):
    lines = [json.dumps({"body": f"tale {i % 50}\n"}) for i in range(150)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    config = make_config(tmp_path / "a.jsonl.gz", text_key="body", valid_fraction=0.2)
    parts = [set(s.split(b"\0")) - {b""} for s in streams(config)]
    assert len(set.union(*parts)) == 50 == sum(map(len, parts))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"txet": "a"}', "a.jsonl line 2 has no field 'text'; did you mean txet"),
        (b'{"text": 3}', "a.jsonl line 2 field 'text' holds int; it must be text"),
        (b'{"text": ', "a.jsonl line 2 is not JSON"),
        (b"[1]", "a.jsonl line 2 holds list, not an object"),
        (b'{"text": "\xff"}', "a.jsonl line 2 byte 24 is not UTF-8 (0xff)"),
        (rb'{"text": "\ud800"}', "a.jsonl line 2 byte 0 is not UTF-8 (0xed)"),
    ],
)
def test_bad_jsonl_names_the_line(make_config, tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line + b"\n")
    said = refused(make_config(tmp_path / "a.jsonl"))
    assert said.startswith(message), said


def test_bad_utf8_names_file_and_byte(make_config, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good text\n\nbad \xff text\n" * 3)
    config = {"tokenizer": "bpe", "bpe_vocab_size": 260, "vocab_size": 300}
    said = refused(make_config(tmp_path / "a.txt", **config))
    assert said.startswith("a.txt byte 15 is not UTF-8 (0xff); set data.bad_utf8 to")
    # Bytes need no decoding.
    assert b"\xff" in b"".join(streams(make_config(tmp_path / "a.txt")))


def test_bad_utf8_is_replaced_or_skipped_and_counted(make_config, tmp_path):
    for i in range(40):
        (tmp_path / "t").mkdir(exist_ok=True)
        bad = b"\xfe\xfe" if i < 4 else b""
        (tmp_path / "t" / f"{i}.txt").write_bytes(b"some text %d" % i + bad)
    options = {"tokenizer": "bpe", "bpe_vocab_size": 300, "vocab_size": 300}
    for policy, field in (("replace", "replaced"), ("skip", "skipped")):
        prepared = prepare(make_config(tmp_path / "t", bad_utf8=policy, **options))
        assert prepared.manifest["bad_utf8"] == {"skipped": 0, "replaced": 0, field: 4}
        tokenizer = prepared.tokenizer()
        text = "".join(
            tokenizer.decode(prepared.array(s, "tokens"))
            for s in ("train", "valid", "test")
        )
        assert text.count("some") == (40 if policy == "replace" else 36)
        assert text.count("\ufffd") == (8 if policy == "replace" else 0)


def test_zero_byte_ends_a_document(make_config, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"first\0second\0third")
    config = make_config(tmp_path / "a.txt", valid_fraction=0.0, test_fraction=0.0)
    starts = prepare(config).array("train", "starts")
    assert starts.tolist() == [0, 6, 13, 19]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tale.tx", "doesn't exist; did you mean tale.txt?"),
        ("no/where/tale.txt", "doesn't exist, nor does its folder"),
        ("*.csv", "matches no file; check the pattern"),
        ("empty", "is an empty folder; put files into it"),
        ("zero.md", "zero.md has no text (it is empty); give it some"),
        ("broken.txt.gz", "can't be read ("),
    ],
)
def test_missing_and_empty_data_is_refused_in_one_line(
    make_config, text_file, name, message
):
    folder = text_file.parent
    (folder / "empty").mkdir()
    (folder / "zero.md").touch()
    (folder / "broken.txt.gz").write_bytes(gzip.compress(b"text" * 999)[:20])
    assert message in refused(make_config(folder / name))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("vision", "tale.txt holds text but model.kind is 'vision'"),
        ("encoder", "tale.txt has no labels but model.kind is 'encoder'"),
    ],
)
def test_text_for_another_kind_of_model_is_refused(
    make_config, text_file, kind, message
):
    assert message in refused(make_config(text_file, kind))
