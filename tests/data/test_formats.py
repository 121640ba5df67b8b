"""Files are read as what they hold, or refused by name; nothing is trained as bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import tarfile
import zipfile

import numpy as np
import pytest

from uoe_jax.data import make_dataset, prepare
from uoe_jax.errors import ConfigError, DataError

ROWS = [{"text": f"tale number {i} of the sea"} for i in range(60)]
LINES = "\n".join(map(json.dumps, ROWS))


def documents(config):
    prepared, found = prepare(config), set()
    for split in ("train", "valid", "test"):
        found |= set(bytes(np.array(prepared.array(split, "tokens"))).split(b"\0"))
    return {d.decode() for d in found - {b""}}


def refused(config):
    with pytest.raises((ConfigError, DataError)) as caught:
        make_dataset(config, "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


EXPECTED = {row["text"] for row in ROWS}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.JSONL", LINES),
        ("a.NdJson", LINES),
        ("a.json", json.dumps(ROWS)),
        ("a.JSON", json.dumps(ROWS, indent=2)),
        ("b.json", LINES),
        ("c.json", json.dumps({"version": 1, "data": ROWS}, indent=1)),
        ("d.json", json.dumps([row["text"] for row in ROWS])),
        ("e.jsonl", "\n\n" + json.dumps(ROWS)),
    ],
)
def test_json_is_read_whatever_its_form_and_ending(
    make_config, tmp_path, name, content
):
    (tmp_path / name).write_text(content)
    assert documents(make_config(tmp_path / name)) == EXPECTED


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.jsonl.GZ", gzip.compress), ("a.JSONL.xz", lzma.compress),
     ("a.jsonl.Bz2", bz2.compress), ("a.jsonl", gzip.compress),
     ("b.jsonl", lzma.compress), ("c.jsonl", bz2.compress)],
)  # fmt: skip
def test_packed_files_are_told_by_ending_or_content(make_config, tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(LINES.encode()))
    assert documents(make_config(tmp_path / name)) == EXPECTED


@pytest.mark.parametrize("name", ["a.parquet", "a.PARQUET", "train-data"])
def test_parquet_is_read(make_config, tmp_path, name):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist(
        [{"id": i, "meta": {"body": row["text"]}} for i, row in enumerate(ROWS)]
    )
    parquet.write_table(table, tmp_path / name)
    config = make_config(tmp_path / name, text_key="meta.body")
    assert documents(config) == EXPECTED
    said = refused(make_config(tmp_path / name, text_key="mta"))
    assert "has no column 'mta'; did you mean meta?" in said
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9] + b"PAR1")
    assert "can't be read as Parquet" in refused(
        make_config(tmp_path / name, text_key="meta.body", source="parquet")
    )


def archive(kind):
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as file:
            file.writestr("a.jsonl", LINES)
    else:
        with tarfile.open(fileobj=out, mode="w") as file:
            info = tarfile.TarInfo("a.jsonl")
            info.size = len(LINES)
            file.addfile(info, io.BytesIO(LINES.encode()))
    return out.getvalue()


def database():
    with sqlite3.connect(":memory:") as opened:
        opened.execute("create table t (x)")
        return opened.serialize()


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.zip", lambda: archive("zip"), "a zip archive; unpack it"),
        ("a.docx", lambda: archive("zip"), "a zip archive; unpack it"),
        ("a.txt", lambda: archive("zip"), "a zip archive; unpack it"),
        ("a.ZIP", lambda: b"", "an archive; unpack it"),
        ("a.tar", lambda: archive("tar"), "a tar archive; unpack it"),
        ("a.tar.gz", lambda: gzip.compress(archive("tar")), "a tar archive"),
        ("a.tgz", lambda: gzip.compress(archive("tar")), "a tar archive"),
        ("a.txt.gz", lambda: gzip.compress(gzip.compress(b"x" * 99)), "twice"),
        ("a.jsonl.zst", lambda: b"\x28\xb5\x2f\xfd rest", "compressed by zstd"),
        ("a", lambda: b"\x28\xb5\x2f\xfd rest", "compressed by zstd"),
        ("a.pdf", lambda: b"%PDF-1.7 words words", "a PDF; save it as text"),
        ("a.db", database, "an SQLite database"),
        ("a.pkl", lambda: pickle.dumps(ROWS), "a format that isn't read"),
        ("a.dat", lambda: pickle.dumps(list(range(9999))), "not a text"),
        ("a.wav", lambda: np.random.default_rng(0).bytes(9000), "not a text"),
        ("a.safetensors", lambda: b"\x08" + bytes(7) + b"{}", "isn't read"),
        ("a.png", lambda: b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG image"),
        ("a.h5", lambda: b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
    ],
)
def test_formats_that_are_not_read_are_refused_by_name(
    make_config, tmp_path, name, content, what
):
    (tmp_path / name).write_bytes(content())
    said = refused(make_config(tmp_path / name))
    assert said.startswith(name) and what in said
    # Whoever wants the bytes says so.
    config = make_config(tmp_path / name, source="text", valid_fraction=0.2)
    if name in ("a.wav", "a.dat"):
        assert len(prepare(config).array("train", "tokens")) > 1000


def write_all(folder, **contents):
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_what_lies_beside_data_is_left_out(make_config, tmp_path, capsys):
    folder = write_all(
        tmp_path / "d",
        a__jsonl=LINES,
        README__md="# words",
        LICENSE="words",
        dataset_info__json="{}",
        chart__png=b"\x89PNG\r\n\x1a\n",
    )
    assert documents(make_config(folder)) == EXPECTED
    assert capsys.readouterr().err.count("4 of 5 files aren't data") == 1


def test_kinds_that_are_mixed_are_refused_with_a_pattern(make_config, tmp_path):
    folder = write_all(tmp_path / "d", a__jsonl=LINES, b__txt="words", c__txt="more")
    said = refused(make_config(folder))
    assert "mixes kinds of data: jsonl (a.jsonl), text (b.txt)" in said
    pattern = said.split("'")[1]
    assert documents(make_config(pattern)) == EXPECTED
    assert documents(make_config(folder, source="jsonl")) == EXPECTED


def test_a_folder_of_code_keeps_its_texts_only(make_config, tmp_path):
    code = {f"f{i}__py": f"x = {i}\n" for i in range(30)}
    folder = write_all(
        tmp_path / "d", package__json='{"a": 1}', logo__png=b"\x89PNG\r\n", **code
    )
    found = documents(make_config(folder))
    assert found == {f"x = {i}\n" for i in range(30)} | {'{"a": 1}'}


@pytest.mark.parametrize("option", ["path", "cache_dir", "tokenizer", "text_key"])
@pytest.mark.parametrize("value", ["", "  "])
def test_empty_names_are_refused(make_config, text_file, option, value):
    config = {"path": text_file} | {option: value}
    path = config.pop("path")
    said = refused(make_config(path, **config))
    assert said == f"data.{option} is empty; give it a value or leave it out"
