"""Records: fields by path, those without a text, half surrogates, splits of a few."""

from __future__ import annotations

import json

import numpy as np
import pytest

from uoe_jax.data import make_dataset, prepare
from uoe_jax.data.record_fields import find_text
from uoe_jax.errors import DataError

GOOD = [{"text": f"tale number {i} of the sea"} for i in range(50)]
BAD = [
    ({"text": None}, "field 'text' holds null; it must be text"),
    ({"other": "x"}, "has no field 'text'"),
    ({"text": 3}, "field 'text' holds int; it must be text"),
    ({"text": ["a"]}, "field 'text' holds list; it must be text"),
    ([1], "holds list, not an object"),
    (None, "holds null, not an object"),
]


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


def stream(config, split="train"):
    return bytes(np.array(prepare(config).array(split, "tokens"))).decode()


def refused(config):
    with pytest.raises(DataError) as caught:
        make_dataset(config, "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("record", "message"), BAD)
def test_a_record_without_text_is_refused_with_the_way_out(
    make_config, tmp_path, record, message
):
    path = write(tmp_path / "a.jsonl", [*GOOD[:10], record, *GOOD[10:]])
    said = refused(make_config(path))
    assert said.startswith(f"a.jsonl line 11 {message}")
    assert said.endswith("; --data.bad-records skip leaves such records out")


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_skipped_records_are_counted(make_config, tmp_path, capsys, ending):
    records = [*GOOD[:10], *(record for record, _ in BAD), *GOOD[10:]]
    path = write(tmp_path / "a.jsonl", records)
    if ending == "json":
        path = tmp_path / "a.json"
        path.write_text(json.dumps(records))
    else:
        path.write_text(path.read_text() + "{broken\n")
    config = make_config(path, bad_records="skip")
    prepared = prepare(config)
    count = len(BAD) + (ending == "jsonl")
    assert prepared.manifest["bad_records"] == count
    assert f"{count} records without a text were left out" in capsys.readouterr().err
    found = "".join(stream(config, s) for s in ("train", "valid", "test"))
    assert {t for t in found.split("\0") if t} == {row["text"] for row in GOOD}
    # Without bad records the arrays and their hash are those of a strict reading.
    good = write(tmp_path / "b.jsonl", GOOD)
    strict, lenient = (
        prepare(make_config(good, bad_records=policy)) for policy in ("error", "skip")
    )
    assert strict.manifest["outputs"] == lenient.manifest["outputs"]
    assert "bad_records" not in strict.manifest


def test_nothing_but_bad_records_says_so(make_config, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": None}] * 3)
    said = refused(make_config(path, bad_records="skip"))
    assert said == "a.jsonl has no text (all 3 records are without one); give it some"


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({"a": {"b": "deep"}}, "a.b"),
        ({"a.b": "deep"}, "a.b"),
        ({"a.b": "deep", "a": {"b": "other"}}, "a.b"),
        ({"turns": [{"content": "no"}, {"content": "deep"}]}, "turns.1.content"),
        ({"a": {"b": {"c": "deep"}}}, "a.b.c"),
    ],
)
def test_dotted_keys_reach_into_a_record(record, key):
    assert find_text(record, key, "line 1") == "deep"


@pytest.mark.parametrize(
    ("record", "key", "message"),
    [
        ({"meta": {"txet": "x"}}, "meta.text", "no field 'text' in field 'meta'; did "),
        ({"meta": "x"}, "meta.text", "no field 'text' in field 'meta'"),
        ({"meta": None}, "meta.text", "no field 'text' in field 'meta'"),
        ({"l": ["x"]}, "l.1", "no field '1' in field 'l'"),
        ({"l": ["x"]}, "l.-1", "no field '-1' in field 'l'"),
        ({"meta": {"text": None}}, "meta.text", "field 'meta.text' holds null"),
    ],
)
def test_a_path_that_ends_early_says_where(record, key, message):
    with pytest.raises(DataError) as caught:
        find_text(record, key, "line 1")
    assert message in str(caught.value)


def test_half_surrogates_are_named_replaced_by_one_mark_or_skipped(
    make_config, tmp_path
):
    lines = [json.dumps(row) for row in GOOD]
    lines[10] = r'{"text": "hi \ud83d there \ude00 \ud83d\ude00"}'
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    said = refused(make_config(path))
    assert said.startswith("a.jsonl line 11 byte 3 is not UTF-8 (0xed), half a ")
    assert r"(\ud83d)" in said and "bad_utf8" in said
    found = {}
    for policy in ("replace", "skip"):
        config = make_config(path, bad_utf8=policy)
        found[policy] = "".join(stream(config, s) for s in ("train", "valid", "test"))
    assert "hi \ufffd there \ufffd \U0001f600" in found["replace"]
    assert "\ufffd" not in found["skip"] and "there" not in found["skip"]


@pytest.mark.parametrize("count", [1, 2])
def test_one_long_document_has_all_splits(make_config, tmp_path, count):
    texts = [
        "".join(f"line {i} of tale {n}, with ü\n" for i in range(400))
        for n in range(count)
    ]
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    config = make_config(path)
    parts = [stream(config, s) for s in ("train", "valid", "test")]
    # Laid end to end they are the documents again, cut between lines.
    assert "".join(parts) == "\0".join(texts) + "\0"
    sizes = [len(part) for part in parts]
    assert 0.04 < sizes[1] / sum(sizes) < 0.06 and 0.04 < sizes[2] / sum(sizes) < 0.06
    assert parts[0].endswith("\n") and parts[1].endswith("\n")
    for split in ("train", "valid", "test"):
        assert make_dataset(config, split).num_batches > 0


def test_one_text_without_a_line_end_is_cut_between_characters(make_config, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "漢" * 900}])
    parts = [stream(make_config(path), s) for s in ("train", "valid", "test")]
    assert "".join(parts) == "漢" * 900 + "\0" and all(parts)


def test_repeats_of_one_text_are_not_cut(make_config, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "the same words again"}] * 40)
    with pytest.raises(DataError, match="has no valid data"):
        make_dataset(make_config(path), "valid")


def test_hostile_json_is_one_line(make_config, tmp_path):
    for content in (
        "[" * 100_000,
        '{"text": ' + "[" * 100_000,
        '{"text": ' + "9" * 5000,
    ):
        (tmp_path / "a.jsonl").write_text(content)
        assert len(refused(make_config(tmp_path / "a.jsonl"))) < 300
