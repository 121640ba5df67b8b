"""One process prepares a corpus: others wait for it, or fetch it from a store."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.train.tiny_runs import make_tiny
from uoe_jax.config import to_json
from uoe_jax.data.batches import make_dataset
from uoe_jax.data.prepare import find_prepared, prepare
from uoe_jax.errors import ConfigError, DataError
from uoe_jax.stores.objects import StoreError
from uoe_jax.validation import validate

module = importlib.import_module("uoe_jax.data.prepare")
WORKER = """
import importlib, sys, time
from pathlib import Path
from uoe_jax.config import from_json

module = importlib.import_module("uoe_jax.data.prepare")

build = module._build

def slowly(*rest):
    print("building", flush=True)
    time.sleep(2)
    return build(*rest)

module._build = slowly
config = from_json(Path(sys.argv[1]).read_text())
print(module.prepare(config).manifest["hash"], flush=True)
"""


def corpus(folder):
    folder.mkdir(exist_ok=True)
    (folder / "a.txt").write_text("one line of text\n\n" * 2000)
    return str(folder / "a.txt")


def test_processes_that_begin_at_once_prepare_one_corpus_once(tmp_path):
    data = {"path": corpus(tmp_path / "texts"), "max_bytes": None}
    config = with_data(make_tiny(cache_dir=tmp_path / "cache"), source="auto", **data)
    (tmp_path / "config.json").write_text(to_json(config))
    command = [sys.executable, "-c", WORKER, str(tmp_path / "config.json")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(command, **pipes) for _ in range(3)]
    said = [worker.communicate(timeout=120) for worker in workers]
    lines = [line for out, _ in said for line in out.splitlines()]
    assert lines.count("building") == 1, said
    assert len({line for line in lines if line != "building"}) == 1
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [
        prepare(config).folder.name
    ]


def with_data(config, **data):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


@pytest.fixture
def config(store, tmp_path):
    path = corpus(tmp_path / "texts")
    tiny = make_tiny(cache_dir="bucket://b/data")
    return with_data(tiny, source="auto", path=path, max_bytes=None)


def test_another_machine_fetches_what_is_prepared(
    config, store, tmp_path, monkeypatch, capsys
):
    first = prepare(config)
    assert first.folder.parent == tmp_path / "cache" / "uoe_jax"
    names = {path.name for path in (store / "b/data" / first.folder.name).iterdir()}
    assert {"manifest.json", "train_tokens.npy"} <= names
    assert "stamps.json" not in names
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(module, "_build", None)  # nothing is prepared again
    again = prepare(config)
    assert "fetching a.txt from bucket://b/data/a.txt-" in capsys.readouterr().err
    assert again.folder != first.folder and again.manifest == first.manifest
    for split, name in (("train", "tokens"), ("valid", "tokens")):
        assert np.array_equal(again.array(split, name), first.array(split, name))
    assert json.loads((again.folder / "stamps.json").read_text())["outputs"]
    prepare(config)
    assert "fetching" not in capsys.readouterr().err
    # A machine that hasn't the text itself.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "third"))
    os.remove(config.data.path)
    dataset = make_dataset(config, "train")
    assert "isn't here: taken as another machine's" in capsys.readouterr().err
    assert dataset.manifest == first.manifest["hash"]


def test_a_changed_text_is_not_what_was_prepared(config, tmp_path, monkeypatch):
    prepare(config)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    with open(config.data.path, "a") as file:
        file.write("more\n")
    with pytest.raises(DataError, match="changed since it was prepared"):
        prepare(config)


def test_half_a_corpus_in_a_store_is_none(config, store, tmp_path, monkeypatch):
    first = prepare(config)
    (store / "b/data" / first.folder.name / "manifest.json").unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert find_prepared(config) is None
    assert prepare(config).manifest == first.manifest
    assert (store / "b/data" / first.folder.name / "manifest.json").is_file()


def test_a_store_that_is_down_is_said_in_one_line(config, store):
    (store / ".down").touch()
    with pytest.raises(StoreError, match=r"^bucket://b/data/a.txt-\w+ can't be used"):
        prepare(config)
    assert find_prepared(config) is None
    with pytest.raises(ConfigError, match="data.path is gs://b/x.txt"):
        validate(with_data(config, path="gs://b/x.txt"))
