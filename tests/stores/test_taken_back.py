"""A new run that can't be sent whole to its store leaves nothing there, nor here."""

import json

import jax
import pytest

from tests.stores.test_runs_in_a_store import ADDRESS, objects_of
from tests.train.tiny_runs import make_tiny
from uoe_jax.errors import ConfigError
from uoe_jax.model import flat_params, make_model
from uoe_jax.runs import write
from uoe_jax.runs.load import load_run
from uoe_jax.runs.store_lock import StoreLock
from uoe_jax.runs.stored import publish
from uoe_jax.runs.write import Origin, write_run
from uoe_jax.stores.objects import Objects, StoreError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = make_tiny("union", cache_dir=tmp_path_factory.mktemp("data"))
    return config, flat_params(make_model(config.model, jax.random.key(0)))


def write_it(model):
    write_run(ADDRESS, *model, Origin(made_by="import", source="a file"))


def local_files(tmp_path):
    """What the copy holds, but for the mark of whose it is."""
    found = (tmp_path / "cache").rglob("*")
    return [path for path in found if path.is_file() and path.name != ".held"]


@pytest.mark.parametrize("failing", ["config.json", "integrity.json", "env.json"])
def test_what_was_sent_before_a_failure_goes_and_the_next_try_works(
    failing, model, store, tmp_path, monkeypatch
):
    send, remove, first = Objects.write, Objects.remove, []

    def refuse(self, name, content):
        if name.split("/")[-1] == failing:
            raise StoreError("no more quota")
        send(self, name, content)

    def note(self, names):
        names = list(names)
        first.append(names)
        remove(self, names)

    with monkeypatch.context() as patch:
        patch.setattr(Objects, "write", refuse)
        patch.setattr(Objects, "remove", note)
        with pytest.raises(StoreError, match="no more quota"):
            write_it(model)
    sent = [names for names in first if names]
    assert sent[0] == ["config.json"] and len(sent[1]) > 1 and sent[2:] == [[".lock"]]
    assert objects_of(store) == set() and local_files(tmp_path) == []
    write_it(model)
    assert load_run(ADDRESS).step == 0


def test_a_signal_after_all_was_sent_leaves_nothing(
    model, store, tmp_path, monkeypatch
):
    def interrupted(folder):
        publish(folder)
        assert "config.json" in objects_of(store)
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "publish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_it(model)
    assert objects_of(store) == set() and local_files(tmp_path) == []


def test_a_store_that_goes_away_says_so_and_nothing_stays_here(
    model, store, tmp_path, monkeypatch
):
    send = Objects.write

    def go(self, name, content):
        if name == "config.json":
            (store / ".down").touch()
        send(self, name, content)

    monkeypatch.setattr(Objects, "write", go)
    with pytest.raises(StoreError, match="no route to host"):
        write_it(model)
    assert local_files(tmp_path) == []
    assert "config.json" not in objects_of(store)  # so it passes for no run


def test_what_another_wrote_meanwhile_is_left(model, store, monkeypatch):
    """Between the first look at the address and its lock."""
    acquire, theirs = StoreLock.acquire, store / "b/runs/r/theirs.txt"

    def late(self):
        theirs.parent.mkdir(parents=True)
        theirs.write_text("kept")
        acquire(self)

    monkeypatch.setattr(StoreLock, "acquire", late)
    with pytest.raises(ConfigError, match="bucket://b/runs/r isn't empty"):
        write_it(model)
    assert objects_of(store) == {"theirs.txt"} and theirs.read_text() == "kept"


def test_who_lost_the_lock_deletes_nothing_of_its_new_holder(model, store, monkeypatch):
    held = store / "b/runs/r/.lock"

    def too_late(folder):
        publish(folder)
        held.write_text(json.dumps(json.loads(held.read_text()) | {"token": "other"}))
        raise StoreError("away for long")

    monkeypatch.setattr(write, "publish", too_late)
    with pytest.raises(StoreError, match="away for long"):
        write_it(model)
    assert {".lock", "config.json"} < objects_of(store)
