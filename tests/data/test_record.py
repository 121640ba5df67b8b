import json

import pytest

from uoe_jax.data.record import read_record, run_tokenizer
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
        (WHOLE | {"hash": 5}, "its hashes must be texts"),
        (WHOLE | {"arrays": [1]}, "its hashes must be texts"),
        (WHOLE | {"tokenizer": 5}, "its tokenizer has no name"),
        (WHOLE | {"tokenizer": {}}, "its tokenizer has no name"),
        (WHOLE | {"tokenizer": {"name": "ids"}}, "vocab_size None"),
        (WHOLE | {"tokenizer": {"name": "ids", "vocab_size": 0}}, "vocab_size 0"),
        (WHOLE | {"earlier": 5}, "earlier is no list"),
    ],
)
def test_a_damaged_record_is_refused_by_what_is_wrong(tmp_path, content, reason):
    file = tmp_path / "data.json"
    file.write_text(json.dumps(content))
    with pytest.raises(DataError) as error:
        read_record(tmp_path)
    assert reason in str(error.value)
    assert str(file) in str(error.value)


def test_an_old_runs_tokenizer_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match=r"tokenizer.json can't be read"):
        run_tokenizer(tmp_path, get_preset("tiny"))
