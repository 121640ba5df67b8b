"""A text is the same tokens whatever encoding its file is in."""

from __future__ import annotations

import codecs
import json
import lzma

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.data import make_dataset, prepare
from uoe_jax.data.encoding import check_encoding, detect, find_encoding, open_text
from uoe_jax.errors import ConfigError, DataError

TEXT = "".join(f"die Größe von Nummer {i} ist 漢字 und 🙂\n\n" for i in range(200))
MARKED = {
    "utf-8-sig": TEXT.encode("utf-8-sig"),
    "utf-16": TEXT.encode("utf-16"),
    "utf-16-le": codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
    "utf-16-be": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "utf-32": TEXT.encode("utf-32"),
    "utf-32-be": codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"),
    "gb18030": b"\x84\x31\x95\x33" + TEXT.encode("gb18030"),
}


def tokens(config):
    prepared = prepare(config)
    return [bytes(np.array(prepared.array(s, "tokens"))) for s in ("train", "valid")]


@pytest.mark.parametrize("name", MARKED)
def test_a_mark_says_how_to_decode(make_config, tmp_path, name):
    (tmp_path / "plain.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "other.txt").write_bytes(MARKED[name])
    wanted = tokens(make_config(tmp_path / "plain.txt"))
    assert tokens(make_config(tmp_path / "other.txt")) == wanted
    assert b"".join(wanted).decode().startswith("die Größe")


@pytest.mark.parametrize("name", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_zeros_say_it_where_there_is_no_mark(make_config, tmp_path, name):
    text = "in the beginning was the word, naïve\n\n" * 100
    (tmp_path / "plain.txt").write_text(text, encoding="utf-8")
    (tmp_path / "other.txt.xz").write_bytes(lzma.compress(text.encode(name)))
    wanted = tokens(make_config(tmp_path / "plain.txt"))
    assert tokens(make_config(tmp_path / "other.txt.xz")) == wanted


@pytest.mark.parametrize("name", ["utf-8-sig", "utf-16", "utf-32"])
def test_json_lines_and_folders_are_decoded_too(make_config, tmp_path, name):
    rows = [json.dumps({"text": f"tale {i} ü"}, ensure_ascii=False) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("\n".join(rows), encoding=name)
    assert tokens(make_config(tmp_path / "b.jsonl")) == (
        tokens(make_config(tmp_path / "a.jsonl"))
    )
    for folder, encoding in (("one", "utf-8"), ("two", name)):
        (tmp_path / folder).mkdir()
        for i in range(40):
            file = tmp_path / folder / f"{i}.txt"
            file.write_text(f"tale {i} ü", encoding=encoding)
    assert tokens(make_config(tmp_path / "two")) == tokens(
        make_config(tmp_path / "one")
    )


def test_an_encoding_that_is_named_is_used(make_config, tmp_path):
    (tmp_path / "plain.txt").write_text("größer als naïv\n\n" * 99, encoding="utf-8")
    wanted = tokens(make_config(tmp_path / "plain.txt"))
    for name in ("latin-1", "cp1252", "cp037", "utf-16-le"):
        (tmp_path / "o.txt").write_text("größer als naïv\n\n" * 99, encoding=name)
        config = make_config(tmp_path / "o.txt", encoding=name)
        assert tokens(config) == wanted
        (tmp_path / "o.txt").unlink()
    with pytest.raises(ConfigError, match="'latin7x', which Python can't decode"):
        prepare(make_config(tmp_path / "plain.txt", encoding="latin7x"))
    with pytest.raises(ConfigError, match="'rot13'"):
        prepare(make_config(tmp_path / "plain.txt", encoding="rot13"))


@pytest.mark.parametrize(
    ("mark", "name"),
    [(b"\xf7\x64\x4c", "UTF-1"), (b"\x0e\xfe\xff", "SCSU"), (b"+/v8-", "UTF-7"),
     (b"\xdd\x73\x66\x73", "UTF-EBCDIC"), (b"\xfb\xee\x28", "BOCU-1")],
)  # fmt: skip
def test_marks_of_what_cannot_be_decoded_are_refused(make_config, tmp_path, mark, name):
    (tmp_path / "a.txt").write_bytes(mark + b"some text\n" * 50)
    with pytest.raises(DataError, match=f"starts with the mark of {name}"):
        make_dataset(make_config(tmp_path / "a.txt"), "train")


def test_broken_characters_are_named_or_replaced(make_config, tmp_path):
    data = bytearray(codecs.BOM_UTF16_LE + ("word " * 400).encode("utf-16-le"))
    data[102:104] = b"\x00\xd8"  # half a pair
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match=r"a.txt byte 102 is not utf-16-le"):
        prepare(make_config(tmp_path / "a.txt"))
    text = b"".join(tokens(make_config(tmp_path / "a.txt", bad_utf8="replace")))
    assert text.decode().count("\ufffd") == 1


@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_text_survives_every_marked_encoding(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("e")
    text = text.lstrip("\ufeff") or "x"
    for name in ("utf-8-sig", "utf-16", "utf-32"):
        (folder / name).write_bytes(text.encode(name))
        if name == "utf-16" and text[0] == "\0":
            continue  # the mark and a zero are UTF-32's mark
        with open_text(folder / name, "auto", strict=True) as file:
            assert file.read().decode() == text


def test_plain_text_is_never_taken_for_another_encoding(tmp_path):
    for text in (b"", b"a", b"\0", b"first\0second\0third", b"ab\0cd\0ef\0gh\0ij\0kl"):
        assert detect(text, "a") == ("utf-8", 0)
    (tmp_path / "a").write_bytes("größer".encode("latin-1"))
    assert find_encoding(tmp_path / "a", "auto") == ("utf-8", 0)


@pytest.mark.parametrize("name", ["idna", "punycode", "undefined", "rot13", "nonsense"])
def test_a_codec_that_is_not_for_text_is_refused(name):
    with pytest.raises(ConfigError, match="Python can't decode"):
        check_encoding(name)
