"""JSON is strict on the way out and on the way in; errors can be printed anywhere."""

import ast
import json
import math
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.errors import ConfigError, DataError
from uoe_jax.escape import escape_line
from uoe_jax.files import (
    MAX_DEPTH,
    format_json,
    parse_json,
    read_json,
    read_json_lines,
)

PACKAGE = Path(__file__).parents[1] / "uoe_jax"

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


def refuse(text: str) -> float:
    raise AssertionError(f"{text} was written")


def same(read: object, value: object) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return read is None
    if isinstance(value, dict):
        return all(same(read[k], value[k]) for k in value) and len(read) == len(value)
    if isinstance(value, list):
        return len(read) == len(value) and all(map(same, read, value))
    return read == value and type(read) is type(value)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(VALUES, st.sampled_from([None, 1, 2]))
def test_json_is_read_back_by_a_strict_parser(value, indent):
    text = format_json(value, indent=indent)
    assert same(json.loads(text, parse_constant=refuse), value)
    assert same(parse_json(text, "text"), value)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"loss": [1.0, object()]}, "the value['loss'][1] is a object"),
        ({"a": {(1, 2): 3}}, "the value['a'] has the key (1, 2)"),
        ({"a": {True: 3}}, "the value['a'] has the key True"),
        ({float("nan"): 3}, "the value has the key nan"),
        ({1, 2}, "the value is a set"),
        (b"bytes", "the value is a bytes"),
    ],
)
def test_what_json_cannot_say_is_refused_with_its_place(value, place):
    with pytest.raises(TypeError, match="^" + re.escape(place)):
        format_json(value)


def test_keys_that_are_numbers_are_written_as_such():
    assert json.loads(format_json({0.5: 1, 3: 2, "a": 3})) == {"0.5": 1, "3": 2, "a": 3}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": NaN}', "NaN is no number of JSON"),
        ("[-Infinity]", "-Infinity is no number of JSON"),
        ("[1e999]", "1e999 is beyond float64"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
        ("[" * 100_000 + "]" * 100_000, f"it has more than {MAX_DEPTH} levels"),
        ('{"a":' * 70 + "1" + "}" * 70, f"it has more than {MAX_DEPTH} levels"),
        ("9" * 5000, "Exceeds the limit"),
        ('{"a": 1,}\n', "line 1, column 9"),
        ("", "line 1, column 1"),
        (b'"\xff"', "byte 1 is not UTF-8"),
        ('{"\x1b[31m": 1, "\x1b[31m": 2}', "line 1, column 3"),
        ('{"\\u001b[31m": 1, "\\u001b[31m": 2}', r"the key '\x1b[31m' is there twice"),
    ],
)
def test_json_that_is_not_strict_is_refused_in_one_line(text, reason):
    with pytest.raises(DataError) as caught:
        parse_json(text, "settings.json")
    said = str(caught.value)
    assert said.startswith("settings.json is not JSON (")
    assert reason in said
    assert "\n" not in said and len(said) < 300


def test_brackets_in_strings_are_no_levels():
    value = {"text": '["[{\\' * 50, "flat": [[]] * 50}
    assert parse_json(format_json(value), "text") == value
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(deep, "text") is not None


def test_a_byte_order_mark_is_no_part_of_json(tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(file) == {"a": 1}


def test_files_of_json_are_limited_before_they_are_read(tmp_path):
    big = tmp_path / "big.json"
    with big.open("wb") as file:
        file.truncate(1 << 40)  # a hole: no disk is used
    with pytest.raises(DataError, match="big.json has 1,099,511,627,776 bytes"):
        read_json(big)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(DataError, match="pipe.json is not a file"):
        read_json(tmp_path / "pipe.json")
    with pytest.raises(OSError):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a plain näme / 名前", "a plain näme / 名前"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("two\nlines\r", r"two\nlines\r"),
        ("run\u202egnp.exe", r"run\u202egnp.exe"),
        ("a\u2066b\u200f\ufeff", r"a\u2066b\u200f\ufeff"),
        ("bad \udcff name", r"bad \udcff name"),
        ("\x9b31m \x85 \u2028", r"\x9b31m \x85 \u2028"),
    ],
)
def test_errors_show_what_a_terminal_would_obey(text, shown):
    assert escape_line(text) == shown
    for kind in (ConfigError, DataError):
        assert str(kind(f"{text} is unknown")) == f"{shown} is unknown"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text())
def test_printable_text_is_printable(text):
    shown = escape_line(text)
    assert shown.isprintable() and escape_line(shown) == shown
    assert shown.encode("utf-8").decode("utf-8") == shown


def calls_of_json(path: Path) -> list[str]:
    """Where a file uses json's own functions, as "name (line)"."""
    found = []
    tree = ast.parse(path.read_text())
    names = {"json"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname for a in node.names if a.name == "json" and a.asname}
        if isinstance(node, ast.ImportFrom) and node.module == "json":
            found += [f"{a.name} ({node.lineno})" for a in node.names]
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in names
            and node.attr in ("dump", "dumps", "load", "loads", "JSONEncoder")
        ):
            found.append(f"{node.attr} ({node.lineno})")
    return found


# Other people's text is read leniently, as they wrote it; a profiler's trace is large.
READS_ITSELF = {"data/records.py": "loads", "bench/profile.py": "loads"}
# An index reads back what it wrote: a thousand runs' settings before a training starts.
READS_ITSELF["runs/index.py"] = "loads"


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_json_is_written_and_read_in_one_place(path):
    name = str(path.relative_to(PACKAGE))
    if name == "files.py":
        return
    allowed = READS_ITSELF.get(name, "no function")
    wrong = [call for call in calls_of_json(path) if not call.startswith(allowed)]
    assert not wrong, f"{name} uses json's {wrong}: take format_json or parse_json"


# They run `uoe` or peers as users do, and import nothing of it.
APART = ("benchmarks/perplexity_peers.py",)


@pytest.mark.parametrize("folder", ["benchmarks", "experiments"])
def test_results_are_written_as_strict_json(folder):
    root = PACKAGE.parent
    for path in (root / folder).rglob("*.py"):
        if str(path.relative_to(root)) not in APART:
            wrong = [x for x in calls_of_json(path) if x.startswith("dump")]
            assert not wrong, f"{path} uses json's {wrong}: take format_json"


def test_a_pipe_under_the_name_of_a_file_is_refused_and_not_waited_for(tmp_path):
    pipe = tmp_path / "metrics.jsonl"
    os.mkfifo(pipe)
    for read in (read_json, read_json_lines):
        with pytest.raises(DataError, match="is not a file"):
            read(pipe)
