"""Prepared data is reused when intact, refused when stale, remade when damaged."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

from uoe_jax.data import make_dataset, prepare
from uoe_jax.data.store import MANIFEST
from uoe_jax.errors import DataError


def inodes(prepared):
    return {p.name: p.stat().st_ino for p in prepared.folder.iterdir()}


def test_second_call_reuses_the_files(make_config, text_file):
    config = make_config(text_file)
    first = prepare(config)
    before = inodes(first)
    second = prepare(config, thorough=True)
    assert inodes(second) == before and second.manifest == first.manifest


def test_manifest_hashes_sources_and_outputs(make_config, text_file):
    import hashlib

    prepared = prepare(make_config(text_file))
    manifest = json.loads((prepared.folder / MANIFEST).read_text())
    data = text_file.read_bytes()
    assert manifest["sources"] == [
        {
            "name": "tale.txt",
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    ]
    for name, entry in manifest["outputs"].items():
        content = (prepared.folder / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert {f"{s}_tokens.npy" for s in ("train", "valid", "test")} <= set(
        manifest["outputs"]
    )


def test_manifest_is_the_same_wherever_the_data_lies(make_config, text_file, tmp_path):
    copied = tmp_path / "elsewhere" / "tale.txt"
    copied.parent.mkdir()
    shutil.copy(text_file, copied)
    one = prepare(make_config(text_file))
    two = prepare(make_config(copied, cache_dir=str(tmp_path / "other")))
    assert one.manifest["hash"] == two.manifest["hash"]
    assert one.folder.name != two.folder.name


def test_options_that_change_the_arrays_get_their_own_folder(make_config, text_file):
    base = prepare(make_config(text_file)).folder
    assert prepare(make_config(text_file, valid_fraction=0.2)).folder != base
    assert prepare(make_config(text_file, max_bytes=4000)).folder != base
    for same in ({"seed": 5}, {"batch_size": 2}, {"pack": "documents"}):
        assert prepare(make_config(text_file, **same)).folder == base


def swap_a_letter(path: Path) -> None:
    """Change a file's content and keep its size and modification time."""
    stat = path.stat()
    path.write_bytes(path.read_bytes().replace(b"line 7 ", b"lime 7 ", 1))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_changed_source_is_refused_until_accepted(make_config, text_file):
    config = make_config(text_file)
    before = prepare(config).manifest["hash"]
    swap_a_letter(text_file)
    with pytest.raises(DataError) as caught:
        make_dataset(config, "train")
    assert str(caught.value) == (
        "tale.txt changed since it was prepared (tale.txt is not the file it was); "
        "restore it or accept it with --data.allow-changed"
    )
    accepted = prepare(make_config(text_file, allow_changed=True))
    assert accepted.manifest["hash"] != before
    text = accepted.tokenizer().decode(accepted.array("train", "tokens"))
    assert "lime 7" in text
    # Accepted once, it is the data from then on.
    assert prepare(config).manifest["hash"] == accepted.manifest["hash"]


def test_a_touched_source_with_the_same_bytes_is_the_same(make_config, text_file):
    config = make_config(text_file)
    before = inodes(prepare(config))
    os.utime(text_file, (1, 1))
    assert inodes(prepare(config)) == before


@pytest.mark.parametrize("change", ["new", "gone"])
def test_files_that_come_or_go_are_noticed(make_config, tmp_path, change):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"text {name}\n" * 30)
    config = make_config(folder)
    prepare(config)
    if change == "new":
        (folder / "d.txt").write_text("more")
    else:
        (folder / "b.txt").unlink()
    with pytest.raises(DataError, match=rf"\([bd].txt is {change}\)"):
        prepare(config)


def damage(folder: Path, how: str) -> None:
    tokens = folder / "train_tokens.npy"
    data = bytearray(tokens.read_bytes())
    if how == "truncated":
        tokens.write_bytes(data[:-100])
    elif how == "flipped":
        data[500] ^= 1
        tokens.write_bytes(data)
    elif how == "missing":
        tokens.unlink()
    elif how == "manifest":
        (folder / MANIFEST).write_text("{")
    else:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["splits"]["train"]["tokens"] += 1
        (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "train_tokens.npy has 7"),
        ("flipped", "train_tokens.npy has other content than its SHA-256 says"),
        ("missing", "train_tokens.npy is missing"),
        ("manifest", "its manifest is damaged or old"),
        ("edited manifest", "its manifest is damaged or old"),
    ],
)
def test_damaged_data_is_prepared_again(make_config, text_file, capsys, how, said):
    config = make_config(text_file)
    first = prepare(config)
    expected = {p.name: p.read_bytes() for p in first.folder.glob("*.npy")}
    damage(first.folder, how)
    again = prepare(config)
    assert {p.name: p.read_bytes() for p in again.folder.glob("*.npy")} == expected
    assert f"preparing tale.txt again: {said}" in capsys.readouterr().err


def test_a_flip_that_keeps_the_file_times_is_found_by_a_thorough_check(
    make_config, text_file, capsys
):
    config = make_config(text_file)
    first = prepare(config)
    damage(first.folder, "flipped")
    stamps = json.loads((first.folder / "stamps.json").read_text())
    stat = (first.folder / "train_tokens.npy").stat()
    stamps["outputs"]["train_tokens.npy"] = [
        stat.st_size,
        stat.st_mtime_ns,
        stat.st_ctime_ns,
    ]
    (first.folder / "stamps.json").write_text(json.dumps(stamps))
    prepare(config, thorough=True)
    assert "other content than its SHA-256 says" in capsys.readouterr().err


def test_a_failed_preparation_leaves_nothing(make_config, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 1}\n')
    config = make_config(tmp_path / "a.jsonl")
    with pytest.raises(DataError):
        prepare(config)
    assert list((tmp_path / "cache").iterdir()) == []


def test_preparing_at_once_gives_one_folder(make_config, text_file, tmp_path):
    config = make_config(text_file)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(prepare(config)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert {r.manifest["hash"] for r in results} == {results[0].manifest["hash"]}
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [results[0].folder.name]


def test_arrays_are_mapped_and_cannot_be_written(make_config, text_file):
    tokens = prepare(make_config(text_file)).array("train", "tokens")
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint8
    with pytest.raises(ValueError):
        tokens[0] = 1


def test_open_maps_outlive_a_replaced_folder(make_config, text_file):
    config = make_config(text_file)
    dataset = make_dataset(config, "train")
    before = dataset.batch(3)
    swap_a_letter(text_file)
    prepare(make_config(text_file, allow_changed=True))
    assert all(np.array_equal(before[k], v) for k, v in dataset.batch(3).items())


def test_cache_folder_follows_the_users_cache(
    make_config, text_file, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folder = prepare(make_config(text_file, cache_dir=None)).folder
    assert folder.parent == tmp_path / "xdg" / "uoe_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = prepare(make_config(text_file, cache_dir=None)).folder
    assert folder.parent == tmp_path / "home" / ".cache" / "uoe_jax"


def test_a_user_without_a_home_or_a_name_has_a_cache_all_the_same(
    make_config, text_file, tmp_path, monkeypatch
):
    """As in a container that runs under a number that no file of users knows."""

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = prepare(make_config(text_file, cache_dir=None)).folder
    assert folder.parent == tmp_path / f"uoe_jax-{os.getuid()}"


def test_an_unwritable_cache_is_refused_in_one_line(make_config, text_file, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="can't be written to .*set data.cache_dir"):
        prepare(make_config(text_file, cache_dir=str(tmp_path / "file" / "cache")))
