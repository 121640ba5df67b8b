"""What data holds is taken for what it is, or refused, or said: never guessed."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.config import DataConfig
from uoe_jax.data import describe
from uoe_jax.data.plan import _PIECE, find_bad_utf8
from uoe_jax.data.progress import note_once
from uoe_jax.errors import DataError
from uoe_jax.presets import get_preset

LINES = [{"text": f"the number {i} is {i * i}", "label": i % 2} for i in range(60)]


def described(tmp_path, path, kind="decoder", **data):
    """Return what `uoe data` says of a file, of texts with labels for encoders."""
    config = get_preset("tiny")
    model = dataclasses.replace(config.model, kind=kind, max_seq_len=32)
    options = DataConfig(
        path=str(path), cache_dir=str(tmp_path / "cache"), batch_size=2, **data
    )
    return describe(dataclasses.replace(config, model=model, data=options))


def write_lines(tmp_path, change, at=7):
    """Write JSON lines of which one is another text."""
    lines = [json.dumps(line) for line in LINES]
    lines[at - 1] = change(lines[at - 1])
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.parametrize("label", ["true", "false"])
def test_a_truth_value_is_no_class_number(tmp_path, label):
    change = lambda line: line.replace('"label": 0', f'"label": {label}')
    file = write_lines(tmp_path, change)
    with pytest.raises(DataError) as error:
        described(tmp_path, file, "encoder")
    word = label.capitalize()
    assert f"line 7 has label {word}; an encoder needs a name" in str(error.value)
    found = described(tmp_path, file, "encoder", bad_records="skip")
    assert sum(split["documents"] for split in found["splits"].values()) == 59


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize(
    ("twice", "key"),
    [
        (lambda line: line[:-1] + ', "text": "another"}', "text"),
        (lambda line: line[:-1] + ', "label": 1}', "label"),
        (lambda line: line[:-1] + ', "more": {"a": 1, "a": 2}}', "a"),
        (lambda line: line[:-1] + ', "t\\u0065xt": "another"}', "text"),
    ],
)
def test_a_key_that_is_there_twice_is_refused(tmp_path, kind, twice, key):
    file = write_lines(tmp_path, twice)
    with pytest.raises(DataError) as error:
        described(tmp_path, file, kind)
    assert f"line 7 is not JSON (the key '{key}' is there twice)" in str(error.value)
    whole = tmp_path / "array.json"
    whole.write_text("[" + ",\n".join(file.read_text().splitlines()) + "]")
    with pytest.raises(DataError, match=f"the key '{key}' is there twice"):
        described(tmp_path, whole, kind)


def test_not_a_number_beside_the_text_is_no_reason_to_refuse(tmp_path):
    file = write_lines(tmp_path, lambda line: line[:-1] + ', "score": NaN}')
    assert described(tmp_path, file)["splits"]["train"]["documents"] > 0


@pytest.mark.parametrize(("encoding", "byte"), [("latin-1", "0xe9"), ("cp437", "0x82")])
def test_bytes_of_another_encoding_are_said_once(tmp_path, capsys, encoding, byte):
    note_once.cache_clear()
    file = tmp_path / "words.txt"
    text = "un caf\u00e9 noir\n\n" * 300
    file.write_bytes(text.encode(encoding))
    assert described(tmp_path, file)["splits"]["train"]["bytes"] > 0
    said = capsys.readouterr().err
    assert said.count("is not UTF-8") == 1
    assert f"words.txt byte 6 is not UTF-8 ({byte}): its bytes are taken" in said
    assert "--data.encoding latin-1" in said
    # Said how it is written, it is read as text: nothing to say.
    found = described(tmp_path, file, encoding=encoding)
    assert "is not UTF-8" not in capsys.readouterr().err
    assert "caf\u00e9" in found["sample"]


def test_sound_text_is_taken_without_a_word(tmp_path, capsys):
    note_once.cache_clear()
    file = tmp_path / "words.txt"
    file.write_text("un caf\u00e9 noir \U0001f600\n\n" * 300)
    described(tmp_path, file)
    assert "UTF-8" not in capsys.readouterr().err


@settings(max_examples=60, deadline=None)
@given(
    st.integers(-8, 8),
    st.sampled_from(["a", "\u00e9", "\u20ac", "\U0001f600"]),
    st.sampled_from([b"", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xe2\x82"]),
    st.integers(0, 4),
)
def test_the_place_found_piece_by_piece_is_that_of_the_whole(shift, char, bad, tail):
    count = (2 * _PIECE + shift) // len(char.encode())
    data = char.encode() * count + bad + b"x" * tail
    try:
        str(data, "utf-8")
        place = None
    except UnicodeDecodeError as error:
        place = error.start
    assert find_bad_utf8(data) == find_bad_utf8(memoryview(data)) == place
