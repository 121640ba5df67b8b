import json

import pytest

from uoe_jax.data.record import (
    DataRecord,
    read_record,
    run_tokenizer,
    write_record,
)
from uoe_jax.errors import DataError
from uoe_jax.presets import get_preset

WHOLE = {
    "hash": "12",
    "tokenizer": {"name": "byte", "vocab_size": 256},
    "arrays": "34",
}


def test_a_whole_record_is_read(tmp_path):
    for content in (WHOLE, WHOLE | {"tokenizer": None}):
        (tmp_path / "data.json").write_text(json.dumps(content))
        record = read_record(tmp_path)
        assert record is not None and record.content == content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "it is no JSON object"),
        ("text", "it is no JSON object"),
        ({"hash": "12"}, "it has no tokenizer"),
        (WHOLE | {"hash": 5}, "hash is 5; expected str"),
        (WHOLE | {"arrays": [1]}, "arrays is [1]; expected str"),
        (WHOLE | {"tokenizer": 5}, "tokenizer is 5; expected a dict"),
        (WHOLE | {"tokenizer": {}}, "its tokenizer has no name"),
        (WHOLE | {"tokenizer": {"name": "ids"}}, "vocab_size None"),
        (WHOLE | {"tokenizer": {"name": "ids", "vocab_size": 0}}, "vocab_size 0"),
        (WHOLE | {"tokenizer": {"name": "bpe", "vocab_size": -1}}, "vocab_size -1"),
        (WHOLE | {"tokenizer": {"name": "byte", "vocab_size": 64}}, "bytes are 256"),
        (WHOLE | {"tokenizer": {"name": "ids", "vocab_size": True}}, "vocab_size True"),
        (WHOLE | {"earlier": 5}, "earlier is 5; expected a list"),
        (WHOLE | {"earlier": [5]}, "earlier is 5; expected str"),
        (WHOLE | {"settings": 3}, "settings is 3; expected a dict"),
        (WHOLE | {"path": 7}, "path is 7; expected str"),
        (WHOLE | {"source": None}, "source is None; expected str"),
        (WHOLE | {"classes": 5}, "classes is 5; expected a list"),
        (WHOLE | {"classes": "abc"}, "classes is 'abc'; expected a list"),
        (WHOLE | {"classes": ["a", 2]}, "classes is 2; expected str"),
        (WHOLE | {"kind": "txt"}, "kind is 'txt'; expected one of 'text'"),
        (WHOLE | {"arrayz": "56"}, "the field 'arrayz'; did you mean arrays?"),
    ],
)
def test_a_damaged_record_is_refused_by_what_is_wrong(tmp_path, content, reason):
    file = tmp_path / "data.json"
    file.write_text(json.dumps(content))
    with pytest.raises(DataError) as error:
        read_record(tmp_path)
    assert reason in str(error.value)
    assert str(file) in str(error.value)


def test_a_folder_in_its_place_is_no_old_run(tmp_path):
    (tmp_path / "data.json").mkdir()
    with pytest.raises(DataError, match=r"data\.json can't be read"):
        read_record(tmp_path)


def test_a_record_that_was_written_is_whole(tmp_path):
    content = WHOLE | {
        "source": "a.txt", "path": "/a.txt", "kind": "rows", "settings": {"use": "x"},
        "classes": ["a", "b"], "earlier": ["00", None],
        "tokenizer": {"name": "ids", "vocab_size": 9, "end_of_document": None},
    }  # fmt: skip
    write_record(tmp_path, DataRecord(content))
    record = read_record(tmp_path)
    assert record is not None and record.content == content


def test_an_old_runs_tokenizer_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match=r"tokenizer.json can't be read"):
        run_tokenizer(tmp_path, get_preset("tiny"))
