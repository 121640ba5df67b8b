"""A request that was given up comes late: never over newer data, nor after a removal.

The stand-in hangs at an event, so that no test depends on how fast the machine is.
"""

import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.stores.bucket import BucketFileSystem
from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.runs.store_lock import StoreLock
from uoe_jax.runs.stored import StoredSteps, take_back
from uoe_jax.stores import objects
from uoe_jax.stores.mirror import _MIRRORS, Mirror
from uoe_jax.stores.objects import Objects, StoreError

ADDRESS = "bucket://b/run"
LATE = "an earlier request that got no answer may still arrive"


@contextmanager
def hanging(monkeypatch, method, end):
    """The first call of a method for a name that ends so hangs, and is given up.

    At once, whatever the limit; others have as long as they need. Gives a function
    that lets it go on and waits until it has ended.
    """
    real, join, left = getattr(BucketFileSystem, method), threading.Thread.join, [end]
    go, hung = threading.Event(), []

    def hang(self, path, *rest, **more):
        if left and str(path).endswith(end):
            left.clear()
            hung.append(threading.current_thread())
            assert go.wait(300)
        return real(self, path, *rest, **more)

    def give_up(thread, seconds=None):
        if thread.name != "store":
            return join(thread, seconds)
        while thread.is_alive() and thread not in hung:
            join(thread, 0.01)

    def let_go():
        go.set()
        for thread in hung:
            join(thread, 300)
            assert not thread.is_alive()

    with monkeypatch.context() as patch:
        patch.setattr(BucketFileSystem, method, hang)
        patch.setattr(threading.Thread, "join", give_up)
        try:
            yield let_go
        finally:
            let_go()


@pytest.fixture
def mirror(store, tmp_path):
    """A copy, with a run's first files and two steps that aren't sent yet."""
    folder = tmp_path / "copy" / "run"
    for step in (8, 9, 10):
        for name in ("state/a/0", "integrity.json"):
            file = folder / "checkpoints" / str(step) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{name} of {step}")
    (folder / "config.json").write_text("{}")
    found = Mirror(ADDRESS, folder, own=True)
    found.push(["config.json"])
    return found


def there(store):
    folder = store / "b/run"
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in files}


def of_step(step):
    return {f"checkpoints/{step}/{name}" for name in ("state/a/0", "integrity.json")}


def test_newer_lines_are_not_sent_before_the_older_ones_came(
    mirror, store, monkeypatch
):
    file, sent = mirror.folder / "metrics.jsonl", store / "b/run/metrics.jsonl"
    file.write_text("step 1\n")
    with hanging(monkeypatch, "pipe_file", "metrics.jsonl") as let_go:
        with pytest.raises(StoreError, match="gave no answer in"):
            mirror.push(["metrics.jsonl"])
        file.write_text("step 1\nstep 2\n")
        with monkeypatch.context() as patch:
            patch.setattr(objects, "ANSWER_SECONDS", 0.05)
            with pytest.raises(StoreError, match=f"run/metrics.jsonl: {LATE}"):
                mirror.push(["metrics.jsonl"])
            with pytest.raises(StoreError, match=LATE):
                mirror.pull()  # what came afterwards would be seen by nobody
            with pytest.raises(StoreError, match=LATE):  # of another copy
                Objects(ADDRESS).remove(["metrics.jsonl"])
        assert not sent.exists()
        let_go()
        assert sent.read_text() == "step 1\n"
    assert "metrics.jsonl" in mirror.changed()  # so the next push mends it
    mirror.push(["metrics.jsonl"])
    assert sent.read_text() == "step 1\nstep 2\n"
    assert "metrics.jsonl" not in mirror.changed()


@pytest.mark.parametrize("what", ["write", "remove"])
def test_a_change_waits_for_the_one_before_it(store, monkeypatch, what):
    objects_, sent = Objects(ADDRESS), store / "b/run/x"
    with hanging(monkeypatch, "pipe_file", "/x") as let_go:
        with pytest.raises(StoreError, match="gave no answer in"):
            objects_.write("x", b"old")
        changes = {
            "write": lambda: objects_.write("x", b"new"),
            "remove": lambda: objects_.remove(["x"]),
        }
        second = threading.Thread(target=changes[what])
        second.start()
        second.join(0.5)  # time enough to overtake the first one
        let_go()
        second.join(300)
    assert sent.read_bytes() == b"new" if what == "write" else not sent.exists()


def test_a_late_removal_does_not_take_what_was_written_after_it(store, monkeypatch):
    objects_, sent = Objects(ADDRESS), store / "b/run/x"
    objects_.write("x", b"old")
    with hanging(monkeypatch, "rm_file", "/x") as let_go:
        with pytest.raises(StoreError, match="gave no answer in"):
            objects_.remove(["x"])
        second = threading.Thread(target=lambda: objects_.write("x", b"new"))
        second.start()
        second.join(0.5)
        let_go()
        second.join(300)
    assert sent.read_bytes() == b"new"


def test_a_late_manifest_makes_no_removed_step_look_whole(mirror, store, monkeypatch):
    steps = StoredSteps(mirror, "checkpoints")
    with hanging(monkeypatch, "pipe_file", "checkpoints/8/integrity.json") as let_go:
        with pytest.raises(StoreError, match="gave no answer in"):
            steps.push(8)
        steps.push(9)  # which doesn't wait, and leaves all of the other one
        assert there(store) == {"config.json", *of_step(9), *of_step(8)} - {
            "checkpoints/8/integrity.json"
        }
        with monkeypatch.context() as patch:
            patch.setattr(objects, "ANSWER_SECONDS", 0.05)
            with pytest.raises(StoreError, match=LATE):
                steps.remove(8)
        let_go()
        assert there(store) == {"config.json", *of_step(9), *of_step(8)}
    assert steps.unfinished() == {8}  # as its save failed here
    steps.push(10)
    assert there(store) == {"config.json", *of_step(9), *of_step(10)}


def test_a_manifest_alone_is_no_checkpoint(mirror, store, tmp_path):
    """As a store may take one that was on its way when its process was killed."""
    StoredSteps(mirror, "checkpoints").push(9)
    late = store / "b/run/checkpoints/8/integrity.json"
    late.parent.mkdir(parents=True)
    late.write_text('{"files": {}}')
    copy = Mirror(ADDRESS, tmp_path / "next" / "run", own=True)
    copy.pull()
    assert StoredSteps(copy, "checkpoints").unfinished() == {8}
    _MIRRORS[copy.folder] = copy
    found = Checkpoints(copy.folder / "checkpoints")
    assert found.steps() == [9]
    assert found.discard_unfinished() == [8]
    assert there(store) == {"config.json", *of_step(9)}


def test_a_new_run_that_is_taken_back_stays_away(mirror, store, monkeypatch):
    _MIRRORS[mirror.folder] = mirror
    mirror.push(["checkpoints/8/state/a/0"])
    with hanging(monkeypatch, "pipe_file", "run/config.json") as let_go:
        with pytest.raises(StoreError, match="gave no answer in"):
            mirror.push(["config.json"])
        back = threading.Thread(target=take_back, args=(mirror.folder,))
        back.start()
        back.join(0.5)
        let_go()
        back.join(300)
    assert there(store) == set()


def test_a_late_sign_of_life_brings_no_lock_back(mirror, store, monkeypatch):
    lock = StoreLock(mirror, print)
    lock.acquire()
    with hanging(monkeypatch, "pipe_file", "run/.lock") as let_go:
        lock._write()
        end = threading.Thread(target=lock.release)
        end.start()
        end.join(0.5)
        let_go()
        end.join(300)
    assert there(store) == {"config.json"}


def test_a_late_download_writes_into_no_newer_file(store, tmp_path, monkeypatch):
    objects_, folder = Objects(ADDRESS), tmp_path / "copy"
    objects_.write("x", b"whole")
    with hanging(monkeypatch, "get_file", "/x") as let_go:
        with pytest.raises(StoreError, match="gave no answer in"):
            objects_.download({"x": 5}, folder)
        objects_.download({"x": 5}, folder)
        let_go()
    assert [path.name for path in folder.iterdir()] == ["x"]
    assert Path(folder / "x").read_bytes() == b"whole"


def test_what_was_given_up_and_has_ended_is_forgotten(store, monkeypatch):
    objects_ = Objects(ADDRESS)
    with hanging(monkeypatch, "pipe_file", "/a/x") as let_go:
        with pytest.raises(StoreError, match="gave no answer in"):
            objects_.write("a/x", b"1")
        assert objects_.is_late("a/") and not objects_.is_late("b/")
        assert not Objects("bucket://b/r").is_late("")  # whose name only begins so
        objects_.write("b/x", b"2")  # others don't wait
        let_go()
    assert not objects_.is_late("") and objects_.list() == {"a/x": 1, "b/x": 1}
