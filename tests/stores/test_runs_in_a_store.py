"""Runs in a store: killed and gone on with, read, locked, and refused in one line."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.train.tiny_runs import make_tiny, with_train
from uoe_jax.cli import main
from uoe_jax.config import MeshConfig, to_json
from uoe_jax.errors import CheckpointError, ConfigError, MissingExtra
from uoe_jax.runs import lock, write
from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.runs.find import find_run
from uoe_jax.runs.folder import open_run_dir
from uoe_jax.runs.load import load_run
from uoe_jax.runs.lock import Locked
from uoe_jax.runs.store_lock import make_lock
from uoe_jax.runs.stored import publish, run_folder
from uoe_jax.stores import objects
from uoe_jax.stores.mirror import _MIRRORS
from uoe_jax.stores.objects import Objects, StoreError, address_of
from uoe_jax.train import train
from uoe_jax.train.metrics import read_metrics
from uoe_jax.validation import validate

ADDRESS = Path("bucket://b/runs/r")  # a Path makes one slash of two
WORKER = """
import os, signal, sys
from pathlib import Path
from tests.stores import bucket
from uoe_jax.config import from_json
from uoe_jax.stores.objects import Objects
from uoe_jax.train import train

# Killed in the middle of sending a checkpoint: some of its files are there.
upload, left = Objects.upload, int(sys.argv[3])

def cut_short(self, names, folder):
    global left
    names = list(names)
    if any(name.startswith("checkpoints/8/state") for name in names):
        upload(self, names[:left], folder)
        os.kill(os.getpid(), signal.SIGKILL)
    upload(self, names, folder)

Objects.upload = cut_short
train(from_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), quiet=True)
"""


def objects_of(store, place="b/runs/r"):
    folder = store / place
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
    }


def steps_of(store):
    """The complete checkpoints of the run in a store."""
    found = (
        re.fullmatch(r"checkpoints/(\d+)/integrity.json", n) for n in objects_of(store)
    )
    return sorted(int(name[1]) for name in found if name)


def arrays_of(folder, step):
    manifest = json.loads((folder / str(step) / "integrity.json").read_text())
    return {name: about["blake2b"] for name, about in manifest["arrays"].items()}


def lines_of(file):
    """What training computed: the lines without their times."""
    timed = ("seconds", "tokens_per_second", "mfu")
    return [
        {name: value for name, value in line.items() if name not in timed}
        for line in read_metrics(file)
    ]


def test_a_run_killed_while_it_sends_goes_on_bit_for_bit(store, tmp_path):
    config = make_tiny("union", cache_dir=tmp_path / "data", keep_checkpoints=2)
    # As many devices as the killed process has: others round otherwise.
    config = dataclasses.replace(config, mesh=MeshConfig(data=1))
    whole = tmp_path / "whole"
    train(config, whole, quiet=True)
    (tmp_path / "config.json").write_text(to_json(config))
    command = [sys.executable, "-c", WORKER, tmp_path / "config.json", ADDRESS, "3"]
    worker = subprocess.run([str(word) for word in command], capture_output=True)
    assert worker.returncode == -signal.SIGKILL, worker.stderr.decode()
    assert 4 in steps_of(store) and 8 not in steps_of(store)
    begun = [n for n in objects_of(store) if n.startswith("checkpoints/8/")]
    assert len(begun) == 3  # of a step that nobody takes for a whole one
    assert load_run(ADDRESS).step == 4
    copies = tmp_path / "cache" / "uoe_jax" / "stores"
    left = [path for path in copies.glob("*/*") if path.name != "read"]
    assert len(left) == 1  # the killed process's copy
    summary = train(config, ADDRESS, quiet=True)
    assert summary["step"] == 12 and summary["run_dir"] == "bucket://b/runs/r"
    assert not left[0].exists()
    assert steps_of(store) == [8, 12]
    for step in (8, 12):
        there = arrays_of(store / "b/runs/r/checkpoints", step)
        assert there == arrays_of(whole / "checkpoints", step)
    metrics = lines_of(store / "b/runs/r/metrics.jsonl")
    assert metrics == lines_of(whole / "metrics.jsonl")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The objects of a run of a few steps, and the config it had."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_BUCKETS", str(folder / "buckets"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        config = make_tiny("union", cache_dir=folder / "data", steps=4)
        (folder / "buckets").mkdir()
        _MIRRORS.clear()
        train(config, ADDRESS, quiet=True)
        _MIRRORS.clear()
    return folder / "buckets" / "b", config


@pytest.fixture
def run(trained, store):
    shutil.copytree(trained[0], store / "b")
    return trained[1]


def test_the_commands_read_and_write_a_run_in_a_store(run, store, tmp_path, capsys):
    run_of = "bucket://b/runs/r"
    assert main(["eval", run_of, "--max-batches", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 4
    copy = run_folder(Path(run_of), "it")
    fetched = {path.parent.name for path in copy.rglob("*") if path.name == ".zarray"}
    assert any(n.startswith("params.") for n in fetched)
    assert not any(n.startswith("opt_state.") for n in fetched)  # not asked for
    assert main(["generate", run_of, "--prompt", "def", "--max-new-tokens", "3"]) == 0
    assert main(["report", run_of, "--no-overlay"]) == 0
    assert "report: bucket://b/runs/r/report.html" in capsys.readouterr().out
    assert (store / "b/runs/r/report.html").is_file()
    assert any(name.startswith("plots/loss") for name in objects_of(store))
    out = "bucket://b/runs/merged"
    assert main(["decompose", run_of, "--merge", "--out", out]) == 0
    assert f"run: {out}\n" in capsys.readouterr().out
    assert load_run(Path(out)).config.model.mlp == ("dense",)
    assert main(["decompose", run_of, "--merge", "--out", out]) == 2
    assert f"{out} isn't empty" in capsys.readouterr().err
    assert main(["train", run_of, "--train.steps", "5", "--no-report", "--quiet"]) == 0
    assert 5 in steps_of(store)


def test_what_a_store_has_lost_or_changed_is_named(run, store):
    file = next(
        (store / "b/runs/r/checkpoints/4/state/params.embed.embedding").glob("0*")
    )
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="changed bytes|has .* bytes, not"):
        load_run(ADDRESS)
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load_run(ADDRESS)


def test_a_checkpoint_that_goes_while_it_is_read(run, store, monkeypatch):
    listed, gone = Objects.list, ["checkpoints/3/config/metadata"]

    def with_one_gone(self):
        return listed(self) | {name: 9 for name in gone[-1:]}

    monkeypatch.setattr(Objects, "list", with_one_gone)
    again = "bucket://b/runs/r changed while it was read; run it again"
    with pytest.raises(StoreError, match=again):
        load_run(ADDRESS)
    tries = iter([*gone])

    def gone_by_then(self):
        return listed(self) | {name: 9 for name in tries}

    monkeypatch.setattr(Objects, "list", gone_by_then)
    assert load_run(ADDRESS).step == 4
    # Its arrays, which come when they are needed.
    shutil.rmtree(run_folder(ADDRESS, "it") / "checkpoints/4/state")
    copy = run_folder(ADDRESS, "it")
    (store / "b/runs/r/checkpoints/4/state/params.embed.embedding/.zarray").unlink()
    with pytest.raises(StoreError, match="changed while it was read"):
        Checkpoints(copy / "checkpoints").restore({"params.embed.embedding": None})


def test_a_changed_copy_is_brought_again(run, store):
    first = load_run(ADDRESS)
    array = "checkpoints/4/state/params.embed.embedding"
    file = next((first.folder / array).glob("0*"))
    file.write_bytes(b"other")
    again = load_run(ADDRESS)
    assert file.read_bytes() == (store / "b/runs/r" / array / file.name).read_bytes()
    assert again.step == first.step


def test_a_save_that_fails_is_told_and_the_next_one_is_whole(run, store, capsys):
    folder = run_folder(ADDRESS, "it", writes=True)
    steps = Checkpoints(folder / "checkpoints")
    arrays = {"a": np.arange(5.0)}
    (store / ".down").touch()
    steps.save(7, arrays, {}, {})
    steps.wait()
    (said,) = steps.poll()
    assert "saving step 7 into" in said and "no route to host" in said
    assert steps.steps() == [4]
    (store / ".down").unlink()
    steps.save(8, arrays, {}, {})
    steps.close()
    assert steps_of(store) == [8]


def test_a_run_that_cannot_be_saved_ends_before_its_first_step(store, tmp_path):
    config = make_tiny(cache_dir=tmp_path / "data", steps=2)
    (store / ".down").touch()
    with pytest.raises(StoreError) as refused:
        train(config, ADDRESS, quiet=True)
    text = str(refused.value)
    assert text.startswith("bucket://b/runs/r can't be used (ConnectionError: no route")
    assert "look at the network and the credentials" in text
    assert objects_of(store) == set()


def test_a_store_that_does_not_answer_is_given_up_soon(store, monkeypatch):
    monkeypatch.setattr(objects, "ANSWER_SECONDS", 0.5)
    (store / ".slow").touch()
    began = time.monotonic()
    try:
        with pytest.raises(StoreError, match="gave no answer in 0 s; look at the netw"):
            run_folder(ADDRESS, "it")
    finally:
        (store / ".slow").unlink()
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("gs://bucket/run", "gs://bucket/run needs gcsfs, which isn't installed; pip"),
        ("s3://bucket/run", "s3://bucket/run needs s3fs, which isn't installed; pip"),
        ("az://bucket/run", "pip install adlfs"),
        ("gz://bucket/run", "no store is known as gz://; did you mean"),
        ("hf://datasets/me/x", "the Hugging Face Hub makes a commit of every write"),
        ("gs://", "gs:// names no folder; give gs://BUCKET/FOLDER"),
        ("gs:///run", "gs:///run names no bucket between // and /; give gs://BUCKET/F"),
        ("S3:////", "s3:// names no folder; give s3://BUCKET/FOLDER"),
        ("file:///tmp/run", "give the local folder"),
    ],
)
def test_an_address_that_cannot_be_is_refused_in_one_line(
    address, said, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    for package in ("gcsfs", "s3fs", "adlfs"):  # as on a machine without them
        monkeypatch.setitem(sys.modules, package, None)
    for command in (["train", "tiny", "--run-dir", address], ["eval", address]):
        began = time.monotonic()
        assert main(command) == 2
        assert time.monotonic() - began < 10
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and said in lines[0], lines
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError):
        load_run(Path(address))


def test_what_is_missing_can_be_caught_as_what_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(MissingExtra):
        Objects("gs://bucket/run").list()


def test_an_address_is_told_from_a_path():
    assert address_of("gs://b/r/") == address_of(Path("gs://b/r")) == "gs://b/r"
    assert address_of("S3://b") == "s3://b"
    for local in ("runs/r", "/r", "c:/r", "file:///r", "", Path(), 3, None):
        assert address_of(local) is None
    for unset in ("gs:///r", "S3:////r", "memory:///a/b"):
        with pytest.raises(StoreError, match=f"^{unset} names no bucket"):
            address_of(unset)
        with pytest.raises(StoreError, match="names no bucket"):
            find_run(unset)
        with pytest.raises(ConfigError, match="names no bucket"):
            validate(make_tiny(cache_dir=unset))


def test_only_one_of_two_machines_holds_a_run(store, monkeypatch):
    folder = run_folder(ADDRESS, "it", writes=True)
    first = make_lock(folder, print)
    first.acquire()
    monkeypatch.setattr(lock, "GONE_SECONDS", 1.5)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.2)
    _MIRRORS.clear()  # as another machine has another copy
    monkeypatch.setenv("XDG_CACHE_HOME", str(store.parent / "other"))
    monkeypatch.setattr(lock, "_machine", lambda: "another boot")
    other = run_folder(ADDRESS, "it", writes=True)
    assert other != folder
    notes = []
    second = make_lock(other, notes.append)
    held = store / "b/runs/r/.lock"
    beating = json.loads(held.read_text())

    def beat(seconds):  # the first one's sign of life
        beating["beat"] += 1
        held.write_text(json.dumps(beating))
        wait(seconds)

    wait = time.sleep
    with monkeypatch.context() as patch:
        patch.setattr("uoe_jax.runs.store_lock.time.sleep", beat)
        with pytest.raises(Locked, match=r"is training in bucket://b/runs/r; stop it"):
            second.acquire()
    second.acquire()  # after a while without one
    assert any("recovered the lock" in note for note in notes)
    first.look()
    with pytest.raises(lock.FolderLost, match="has taken bucket://b/runs/r over"):
        first.check()
    first.release()
    assert held.exists()  # the second one's
    second.release()
    assert not held.exists()


def test_of_two_commands_that_write_one_address_one_does(
    run, store, monkeypatch, capsys
):
    """The other one starts while the first one writes, on a machine of its own."""
    made = ["decompose", "bucket://b/runs/r", "--merge", "--out", "bucket://b/runs/cut"]
    wanted, said, settings = store / "b/runs/cut", [], write.write_settings

    def meanwhile(folder, *rest):
        settings(folder, *rest)
        if not said:
            said.append("began")
            mine, cache = dict(_MIRRORS), os.environ["XDG_CACHE_HOME"]
            _MIRRORS.clear()
            os.environ["XDG_CACHE_HOME"] = str(store.parent / "other")
            try:
                said.append(main([*made, "--json"]))
            finally:
                os.environ["XDG_CACHE_HOME"] = cache
                _MIRRORS.clear()
                _MIRRORS.update(mine)
        assert (wanted / ".lock").exists()

    monkeypatch.setattr(write, "write_settings", meanwhile)
    assert main(made) == 0
    assert said == ["began", 2]
    told = capsys.readouterr().err
    assert "is at work in bucket://b/runs/cut; stop it or choose another --out" in told
    assert not (wanted / ".lock").exists()
    assert load_run(Path("bucket://b/runs/cut")).config.model.mlp == ("dense",)
    assert main(made) == 2  # and later it isn't empty


def test_an_address_stays_locked_however_long_it_is_sent_to(run, store, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    held, sent = store / "b/runs/cut/.lock", []

    def slowly(folder):
        first = json.loads(held.read_text())["beat"]
        end = time.monotonic() + 20
        while json.loads(held.read_text())["beat"] < first + 3:
            assert time.monotonic() < end
            time.sleep(0.01)
        sent.append(folder)
        publish(folder)

    monkeypatch.setattr(write, "publish", slowly)
    out = "bucket://b/runs/cut"
    assert main(["decompose", "bucket://b/runs/r", "--merge", "--out", out]) == 0
    assert len(sent) == 1 and not held.exists()
    assert load_run(Path(out)).config.model.mlp == ("dense",)


def test_what_stays_local_says_what_to_do(store, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = ["--grid", "optim.learning-rate=1e-3,1e-4"]
    for command in (
        ["runs", "gs://b/all"],
        ["runs", "memory://all"],
        ["sweep", "tiny", "--out", "gs://b/all", *grid],
        ["train", "tiny", "--data.path", "gs://b/text.txt"],
        ["export", "run", "s3://b/model"],
    ):
        assert main(command) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and "mount the store" in lines[0], lines
    assert list(tmp_path.iterdir()) == [store]


def test_a_dead_process_of_this_machine_is_not_waited_for(store):
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    folder = run_folder(ADDRESS, "it", writes=True)
    probe = make_lock(folder, print)
    owner = probe._me | {"pid": gone.pid, "token": "other"}
    (store / "b/runs/r").mkdir(parents=True)
    (store / "b/runs/r/.lock").write_text(json.dumps(owner))
    began = time.monotonic()
    probe.acquire()
    assert time.monotonic() - began < 10
    probe.release()


def test_without_create_if_absent_the_last_writer_has_the_lock(store, monkeypatch):
    there = Objects("bucket://b/plain")
    call = Objects._call

    def overwrites(self, method, name, *rest, **more):
        more.pop("mode", None)
        return call(self, method, name, *rest, **more)

    monkeypatch.setattr(Objects, "_call", overwrites)
    assert there.create("x", b"one")
    read = there.read
    monkeypatch.setattr(Objects, "read", lambda self, name: b"another's")
    assert not there.create("x", b"two")
    assert read("x") == b"two"


def test_a_lock_whose_creation_was_tried_twice_is_held(store, monkeypatch):
    there, call = Objects("bucket://b/plain"), Objects._call

    def twice(self, method, name, *rest, **more):
        call(self, method, name, *rest, **more)  # its answer was lost
        return call(self, method, name, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Objects, "_call", twice)
        assert there.create("x", b"one")
    assert not there.create("x", b"two") and there.read("x") == b"one"


def test_what_a_reader_writes_goes_up_and_what_is_gone_goes_away(run, store):
    folder = run_folder(ADDRESS, "it")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.html").write_text("one")
    publish(folder)
    assert (store / "b/runs/r/notes/a.html").read_text() == "one"
    (store / "b/runs/r/notes/a.html").unlink()
    assert run_folder(ADDRESS, "it") == folder
    assert not (folder / "notes").exists()


def test_a_memory_store_of_fsspec_trains_and_goes_on(store, tmp_path):
    config = make_tiny(cache_dir=tmp_path / "data", steps=4)
    place = Path(f"memory://pods-{os.getpid()}/run")
    assert train(config, place, quiet=True)["step"] == 4
    _MIRRORS.clear()
    more = with_train(config, steps=6)
    assert train(more, place, quiet=True)["step"] == 6
    train(more, tmp_path / "local", quiet=True)
    # A run of 6 steps has another schedule than one of 4 that goes on: compare files.
    assert load_run(place).step == 6


def test_a_run_starts_from_and_learns_from_one_in_a_store(run, store, tmp_path, capsys):
    from uoe_jax import api

    config = dataclasses.replace(run, name="next")
    api.train(config, tmp_path / "next", init_from="bucket://b/runs/r", quiet=True)
    record = json.loads((tmp_path / "next" / "init_from.json").read_text())
    assert record["source"] == "bucket://b/runs/r" and record["step"] == 4
    again = with_train(config, steps=5)
    api.train(again, tmp_path / "next", init_from="bucket://b/runs/r", quiet=True)
    taught = with_train(run, distill_from="bucket://b/runs/r", steps=2)
    api.train(taught, tmp_path / "taught", quiet=True)
    kept = json.loads((tmp_path / "taught" / "config.json").read_text())
    assert kept["train"]["distill_from"] == "bucket://b/runs/r"


def test_a_reader_sends_nothing_that_another_reader_brought(run, store):
    first = run_folder(ADDRESS, "it")
    mine = dict(_MIRRORS)
    before = objects_of(store)
    _MIRRORS.clear()
    assert run_folder(ADDRESS, "it") == first  # of another process, into one copy
    _MIRRORS.clear()
    _MIRRORS.update(mine)
    metrics = store / "b/runs/r/metrics.jsonl"
    metrics.write_text(metrics.read_text() + "\n")  # the run trains meanwhile
    longer = metrics.read_bytes()
    (first / "report.html").write_text("a page")
    publish(first)
    assert objects_of(store) == {*before, "report.html"}
    assert metrics.read_bytes() == longer
    assert load_run(ADDRESS).step == 4


def test_a_run_is_read_while_its_old_checkpoint_goes(run, store, monkeypatch):
    download = Objects.download
    place = store / "b/runs/r/checkpoints"
    shutil.copytree(place / "4", place / "3")

    def prune(self, sizes, folder):
        shutil.rmtree(place / "3", ignore_errors=True)
        download(self, sizes, folder)

    monkeypatch.setattr(Objects, "download", prune)
    folder = run_folder(ADDRESS, "it")
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["4"]
    run_folder(ADDRESS, "it")

    def gone(self, sizes, folder):
        raise FileNotFoundError("an object")

    monkeypatch.setattr(Objects, "download", gone)
    with pytest.raises(StoreError, match="changed while it was read; run it again"):
        run_folder(ADDRESS, "it")
    with pytest.raises(StoreError, match="changed while it was read; run it again"):
        load_run(folder)


def test_a_folder_that_is_no_run_is_not_brought(run, store, tmp_path, capsys):
    (store / "b/corpus.bin").write_bytes(bytes(1_000_000))
    assert main(["eval", "bucket://b"]) == 2  # as runs lie below it
    assert "no run at bucket://b (no config.json there)" in capsys.readouterr().err
    brought = (tmp_path / "cache").rglob("*")
    assert sum(p.stat().st_size for p in brought if p.is_file()) < 1000
    out = "bucket://b/runs"
    assert main(["decompose", "bucket://b/runs/r", "--merge", "--out", out]) == 2
    assert f"{out} isn't empty" in capsys.readouterr().err


def test_what_a_failed_save_sent_goes_with_the_next(run, store, monkeypatch):
    folder = run_folder(ADDRESS, "it", writes=True)
    steps = Checkpoints(folder / "checkpoints")
    arrays = {"a": np.arange(5.0)}
    write = Objects.write

    def cut_short(self, name, content):
        if name.endswith("7/integrity.json"):
            raise StoreError("away")
        write(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(Objects, "write", cut_short)
        steps.save(7, arrays, {}, {})
        steps.wait()
    # It may have come all the same, after nobody waited any more.
    (store / "b/runs/r/checkpoints/7/integrity.json").write_text("late")
    steps.save(8, arrays, {}, {})
    steps.close()
    left = {name.split("/")[1] for name in objects_of(store) if name[:5] == "check"}
    assert left == {"8"}


def test_what_ended_a_run_is_told_before_what_its_store_says(run, store, capsys):
    folder = run_folder(ADDRESS, "it", writes=True)
    with pytest.raises(ZeroDivisionError) as told:
        with open_run_dir(folder, run, note=print):
            (folder / "dump.txt").write_text("what went wrong")
            (store / ".down").touch()
            raise ZeroDivisionError
    assert "no route to host" in "".join(told.value.__notes__)
    (store / ".down").unlink()
    (store / "b/runs/r/.lock").unlink()  # it couldn't be given back either
    with pytest.raises(StoreError, match="no route"):
        with open_run_dir(folder, run, note=print):
            (folder / "dump.txt").write_text("more")
            (store / ".down").touch()


def test_a_copy_needs_a_place(store, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(StoreError, match="set XDG_CACHE_HOME to a folder that can"):
        run_folder(ADDRESS, "it", writes=True)
    with pytest.raises(StoreError, match="set XDG_CACHE_HOME to a folder that can"):
        (store / "b/runs/r").mkdir(parents=True)
        (store / "b/runs/r/config.json").write_text("{}")
        run_folder(ADDRESS, "it")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert run_folder(ADDRESS, "it", writes=True).is_absolute()


@pytest.mark.parametrize("name", ["b/..", "b/../c", "b/./c", ".."])
def test_dots_are_no_folders_of_a_store(name):
    with pytest.raises(StoreError, match="a store has no . or .. "):
        Objects(f"gs://{name}")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "./x"])
def test_an_object_that_leads_out_of_the_folder_is_refused(store, monkeypatch, name):
    (store / "b/out").mkdir(parents=True)
    there = Objects("bucket://b/out")
    system, root = there._open()
    listed = {f"{root}/{n}": {"size": 1} for n in (name, "marked/", "plain")}
    monkeypatch.setattr(type(system), "find", lambda *args, **options: listed)
    with pytest.raises(StoreError, match="names no file below it"):
        there.list()
    listed.pop(f"{root}/{name}")
    assert there.list() == {"plain": 1}
