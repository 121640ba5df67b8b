"""Sizes are looked at before content is read; options are used or refused."""

from __future__ import annotations

import dataclasses
import json
import lzma
import os
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from uoe_jax.config import DataConfig
from uoe_jax.data import make_dataset, prepare
from uoe_jax.data.bpe import train_bpe
from uoe_jax.data.options import check_used, used_options
from uoe_jax.data.subword import SubwordTokenizer
from uoe_jax.errors import ConfigError, DataError

IMAGES = {"image_size": 4, "image_patch": 2, "num_classes": 4}


def refused(config):
    with pytest.raises((ConfigError, DataError)) as caught:
        make_dataset(config, "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def peak(work):
    """Return a function's result and the most memory that Python and numpy held."""
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def save_images(path, labels, **more):
    images = np.arange(len(labels) * 16, dtype=np.uint8).reshape(-1, 4, 4)
    np.savez_compressed(path, images=images, labels=np.asarray(labels), **more)
    return path


@pytest.mark.parametrize(
    "label", [10**9, 2**31, 2**32 + 1, 2**40, np.uint64(2**63 + 1), 2**20]
)
def test_labels_that_no_list_of_classes_holds_are_refused(make_config, tmp_path, label):
    labels = np.array([0, 1, 2, int(label)] * 10, getattr(label, "dtype", np.int64))
    path = save_images(tmp_path / "a.npz", labels)
    said, used = peak(lambda: refused(make_config(path, "vision", **IMAGES)))
    assert f"has label {label}; classes go up to 1,048,575" in said
    assert used < 20e6
    rows = [{"text": f"tale {i}", "label": int(n)} for i, n in enumerate(labels)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = refused(make_config(tmp_path / "a.jsonl", "encoder"))
    assert said.startswith(f"a.jsonl line 4 has label {label}")


def test_the_largest_class_is_taken(make_config, tmp_path):
    path = save_images(tmp_path / "a.npz", [0, 1, 2, 3] * 10)
    assert len(prepare(make_config(path, "vision", **IMAGES)).manifest["classes"]) == 4


def test_arrays_that_nobody_reads_stay_unread(make_config, tmp_path):
    huge = np.broadcast_to(np.zeros((), np.uint8), (200_000_000,))
    path = save_images(tmp_path / "a.npz", [0, 1, 2, 3] * 10, extra=huge)
    config = make_config(path, "vision", **IMAGES)
    _, used = peak(lambda: make_dataset(config, "train"))
    assert path.stat().st_size < 1e6 and used < 20e6


def test_a_header_that_lies_is_refused_before_anything_is_read(make_config, tmp_path):
    path = save_images(tmp_path / "a.npz", [0, 1, 2, 3] * 10)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.npz", "w") as new:
        for name in old.namelist():
            content = old.read(name).replace(b"(40, 4, 4)", b"(4000000,)")
            new.writestr(name, content)
    said, used = peak(
        lambda: refused(make_config(tmp_path / "b.npz", "vision", **IMAGES))
    )
    assert "images says [4000000] uint8, 4,000,000 bytes, but holds 640" in said
    assert used < 20e6
    tokens = tmp_path / "c.npy"
    np.save(tokens, np.arange(200, dtype=np.uint16))
    tokens.write_bytes(tokens.read_bytes().replace(b"(200,)", b"(9" + b"9" * 9 + b",)"))
    assert "can't be read as arrays" in refused(make_config(tokens))


@pytest.mark.parametrize("values", [[2**31], [2**40], [2**32 + 5]])
def test_token_ids_beyond_int32_are_refused(make_config, tmp_path, values):
    tokens = np.array([1, 2, 3, *values] * 50)
    np.savez(tmp_path / "a.npz", tokens=tokens)
    said = refused(make_config(tmp_path / "a.npz", vocab_size=300))
    assert f"has token id {values[0]}; ids go up to 2,147,483,647" in said


def test_pixels_that_overflow_float32_are_refused(make_config, tmp_path):
    np.savez(tmp_path / "a.npz", images=np.full((9, 4, 4), 1e39), labels=np.arange(9))
    said = refused(make_config(tmp_path / "a.npz", "vision", **IMAGES))
    assert "pixels that aren't finite" in said


@pytest.mark.parametrize("name", ["a.txt.xz", "a.jsonl.xz"])
def test_max_bytes_unpacks_no_more_than_it_needs(make_config, tmp_path, name):
    row = json.dumps({"text": "x" * 90})
    size = 60_000_000
    content = ((row + "\n") if "json" in name else "x" * 99 + "\n") * (size // 100)
    (tmp_path / name).write_bytes(lzma.compress(content.encode(), preset=0))
    before = {p: p.stat().st_size for p in tmp_path.iterdir()}
    config = make_config(tmp_path / name, max_bytes=1000)
    start = time.perf_counter()
    prepared, used = peak(lambda: prepare(config))
    assert used < 10e6 and before
    # Unpacking it all takes many times as long as the first buffers of it.
    whole = time.perf_counter()
    with lzma.open(tmp_path / name) as file:
        while file.read(1 << 20):
            pass
    assert whole - start < 2 * (time.perf_counter() - whole) + 2.0
    total = sum(s["tokens"] for s in prepared.manifest["splits"].values())
    assert 900 < total < 1100


def test_a_prepared_array_that_was_cut_short_is_never_mapped(make_config, text_file):
    prepared = prepare(make_config(text_file))
    file = prepared.folder / "train_tokens.npy"
    content = file.read_bytes()
    file.write_bytes(content[:500])
    with pytest.raises(DataError, match="train_tokens.npy has 500 bytes instead of"):
        prepared.array("train", "tokens")
    file.write_bytes(content[:-1] + b"?")
    with pytest.raises(DataError, match="other content than its SHA-256 says"):
        prepared.array("train", "tokens")
    # The next command makes it anew.
    assert len(make_dataset(make_config(text_file), "train").prepared.array(
        "train", "tokens")) > 5000  # fmt: skip


@pytest.mark.parametrize(
    "text", ["acgt" * 75_000, " " * 300_000, "-" * 300_000, "漢字" * 50_000]
)
def test_bpe_learns_from_one_unbroken_line_in_seconds(text):
    start = time.perf_counter()
    trained = train_bpe([text.encode()], 400)
    ids = SubwordTokenizer(trained, "bpe").encode_documents([text.encode()])[0]
    assert time.perf_counter() - start < 20  # minutes without a limit on words
    assert SubwordTokenizer(trained, "bpe").decode(ids) == text


def test_bpe_of_ordinary_words_is_as_without_the_limit(monkeypatch):
    corpus = [
        f"the tale {i} of thé {i * i} hats {'x' * i}\n".encode() for i in range(60)
    ]
    limited = train_bpe(corpus, 400)
    monkeypatch.setattr("uoe_jax.data.bpe._WORD_BYTES", 1 << 16)
    assert train_bpe(corpus, 400) == limited
    assert json.loads(limited)["pre_tokenizer"]["type"] == "ByteLevel"


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_stops_bpe_at_once():
    program = (
        "import random, sys; from uoe_jax.data import bpe\n"
        "bpe._WORD_BYTES = 100_000\n"  # so that it takes minutes
        "r = random.Random(0); text = ''.join(r.choices('acgt', k=1_000_000))\n"
        "print('begun', flush=True)\n"
        "bpe.train_bpe([text.encode()], 30_000)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(2.0)
    process.send_signal(signal.SIGINT)
    start = time.perf_counter()
    _, said = process.communicate(timeout=30)
    assert time.perf_counter() - start < 10
    assert process.returncode and b"KeyboardInterrupt" in said


SOURCES = {"stdlib": "decoder", "digits": "vision", "listops": "encoder",
           "pathfinder": "vision", "recall": "decoder", "text": "decoder",
           "jsonl": "decoder", "parquet": "decoder", "npz": "vision",
           "copying": "decoder", "tfds": "decoder"}  # fmt: skip
OTHER = {"path": "x", "data_dir": "d", "encoding": "latin-1", "tokenizer": "bpe",
         "bpe_vocab_size": 999, "text_key": "body", "bad_records": "skip",
         "seq_len": 4, "pack": "documents", "bad_utf8": "skip", "valid_fraction": 0.2,
         "test_fraction": 0.2, "max_bytes": 99, "num_examples": 64, "min_length": 5,
         "max_length": 99, "pairs": 3}  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", OTHER)
def test_every_option_is_used_or_refused(source, name):
    kind = SOURCES[source]
    data = dataclasses.replace(DataConfig(), **{name: OTHER[name]})
    if name in used_options(data, source, kind):
        check_used(data, source, kind, {name})
        return
    said = rf"data.{name} is .*, but data.source {source} for a {kind} model doesn't"
    with pytest.raises(ConfigError, match=said):
        check_used(data, source, kind, {name})
    # Typed with its default value it would be ignored all the same.
    with pytest.raises(ConfigError, match=f"data.{name} is "):
        check_used(DataConfig(), source, kind, {name})


def test_sources_refuse_options_from_python_too(make_config):
    for source, kind in (("digits", "vision"), ("stdlib", "decoder")):
        said = refused(make_config("/nonexistent.npz", kind, source=source))
        assert said.startswith(
            f"data.path is '/nonexistent.npz', but data.source {source}"
        )
    assert "data.num_examples is 64" in refused(make_config(num_examples=64))
    # What presets give along with their vocabulary isn't refused.
    assert make_dataset(make_config(kind="vision", tokenizer="bpe"), "train")


def test_pythons_share_a_cache_of_the_standard_library(
    make_config, tmp_path, monkeypatch
):
    def library(version, files):
        root = tmp_path / version
        root.mkdir()
        for name, content in files.items():
            (root / name).write_text(content * 50)
        monkeypatch.setattr("sysconfig.get_path", lambda _: str(root))

    library("3.12", {f"m{i}.py": f"x = {i}\n" for i in range(30)})
    first = prepare(make_config())
    library("3.13", {f"m{i}.py": f"x = {i}\n" for i in range(29)} | {"new.py": "y\n"})
    second = prepare(make_config())
    assert first.folder != second.folder
    assert first.manifest["hash"] != second.manifest["hash"]
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "3.12"))
    assert prepare(make_config()).folder == first.folder
